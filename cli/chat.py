"""`mlx-adapters chat MODEL`: talk to a model and its adapters in the terminal."""

import signal
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_adapters.cli import options
from mlx_adapters.cli.options import opt
from mlx_adapters.cli.screen import say
from mlx_adapters.errors import AdaptersError
from mlx_adapters.signals import telling

if TYPE_CHECKING:
    from mlx_adapters.generate.conversation import Conversation
    from mlx_adapters.serve import Engine


def command(
    model: options.Model,
    adapter: options.Adapters = None,
    template: options.Template = None,
    chat_template_kwargs: options.ChatTemplateKwargs = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.0,
    top_p: Annotated[float, opt("draw from the fewest tokens with this probability", min=0, max=1)] = 1.0,
    seed: Annotated[int | None, opt("seed of the sampling [default: a new one each time]")] = None,
    web: Annotated[bool, opt("a page in the browser instead (extra `web`)", "--web")] = False,
    port: Annotated[int, opt("port of --web, at 127.0.0.1", min=1, max=65535)] = 7860,
) -> None:
    """Chat in the terminal; adapters are switched in place. Type /help there."""
    from mlx_adapters.adapter.multi import load_named
    from mlx_adapters.data.templates import wanted_template
    from mlx_adapters.generate.conversation import Conversation

    given: dict[str, Any] = {"template": template, "chat_template_kwargs": chat_template_kwargs}
    wanted_template(template)  # a typing error is told before the model loads
    loaded, metas = load_named(model, adapter or (), base="base")
    settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    if web:
        from mlx_adapters.serve import Engine

        _page(Engine(loaded, metas, name="base", **given), port, seed=seed, **settings)
        return
    with telling(""):
        _loop(Conversation(loaded, metas, seed=seed, **given, **settings))


def _page(engine: "Engine", port: int, **settings: Any) -> None:
    """The page's threads ask; this one, which loaded the model, answers until Ctrl-C."""
    from mlx_adapters.cli.serve import until_stopped
    from mlx_adapters.serve.page import build, opened

    page = build(engine, title=f"{engine.loaded.path.name} with mlx-adapters", **settings)
    until_stopped(engine, opened(page, host="127.0.0.1", port=port), "answers as")


def _loop(chat: "Conversation") -> None:
    from mlx_adapters.generate.conversation import HELP

    # a shell starts what it puts in the background with Ctrl-C ignored, and Python keeps that; Ctrl-C ends an
    # answer here, not the program: no message
    signal.signal(signal.SIGINT, signal.default_int_handler)
    compare = False
    if sys.stdin.isatty():
        say(f"{chat.loaded.path.name}, {chat.name}. /help lists the commands, Ctrl-D ends")
    while True:
        try:
            line = input(f"{chat.name}> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            say("")
            continue
        if line == "/compare":
            compare = True
            say("the next message is answered by all")
        elif line == "/help":
            typer.echo(HELP)
        elif line.startswith("/"):
            say(chat.order(line))
        elif line:
            for name, answer in chat.compare(line) if compare else [("", chat.ask(line))]:
                if compare:
                    typer.echo(f"[{name}]")
                _write(answer)
            compare = False


def _write(answer: Generator[str]) -> None:
    try:
        for piece in answer:
            typer.echo(piece, nl=False)
    except AdaptersError as error:
        say(f"error: {error}")
        return
    except KeyboardInterrupt:  # the answer ends here
        answer.close()
    typer.echo()
