"""`mlx-adapters chat MODEL`: talk to a model and its adapters in the terminal."""

import contextlib
import signal
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_adapters.cli import options
from mlx_adapters.cli.options import fields_as_options, opt
from mlx_adapters.errors import AdaptersError
from mlx_adapters.fields import merged, parse_fields
from mlx_adapters.generate.config import AnswerConfig
from mlx_adapters.screen import say
from mlx_adapters.signals import telling

_BLOCK = '"""'
_END = ("/exit", "/quit", "exit", "quit")

if TYPE_CHECKING:
    from mlx_adapters.adapter import AdapterMeta
    from mlx_adapters.generate.conversation import Conversation
    from mlx_adapters.models.load import LanguageModel


@fields_as_options(AnswerConfig)
def command(
    model: options.Model,
    adapter: options.Adapters = None,
    web: Annotated[bool, opt("a page in the browser instead (extra `web`)", "--web")] = False,
    port: Annotated[int, opt("port of --web, at 127.0.0.1", min=1, max=65535)] = 7860,
    **given: Any,
) -> None:
    """Chat in the terminal; adapters are switched in place. Type /help there."""
    from mlx_adapters.adapter.multi import load_named
    from mlx_adapters.data.templates import wanted_template
    from mlx_adapters.generate.conversation import Conversation

    config = parse_fields(AnswerConfig, merged({}, given), where="chat")
    wanted_template(config.template)  # a typing error is told before the model loads
    loaded, metas = load_named(model, adapter or (), base="base")
    if web:
        _page(loaded, metas, port, config)
        return
    with telling(""):
        _loop(Conversation(loaded, metas, **config.arguments()))


def _page(loaded: "LanguageModel", metas: "dict[str, AdapterMeta]", port: int, config: AnswerConfig) -> None:
    """The page's threads ask; this one, which loaded the model, answers until Ctrl-C."""
    from mlx_adapters.cli.serve import until_stopped
    from mlx_adapters.serve import Engine
    from mlx_adapters.serve.page import build, opened

    kwargs = config.chat_template_kwargs
    engine = Engine(loaded, metas, name="base", template=config.template, chat_template_kwargs=kwargs)
    page = build(engine, title=f"{loaded.path.name} with mlx-adapters", config=config)
    until_stopped(engine, opened(page, host="127.0.0.1", port=port), "answers as")


def _loop(chat: "Conversation") -> None:
    from mlx_adapters.generate.conversation import HELP

    # a shell starts what it puts in the background with Ctrl-C ignored, and Python keeps that; Ctrl-C ends an
    # answer here, not the program: no message
    signal.signal(signal.SIGINT, signal.default_int_handler)
    compare = False
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing, and the messages before by the arrow keys)
    if sys.stdin.isatty():
        say(f"{chat.loaded.path.name}, {chat.name}. /help lists the commands, Ctrl-D ends")
    while True:
        try:
            line = _message(f"{chat.name}> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            say("")
            continue
        if line in _END:
            return
        if line == "/compare":
            compare = True
            say("the next message is answered by all")
        elif line == "/help":
            typer.echo(HELP)
        elif line == "/retry":
            _write(chat.retry())
        elif line.startswith("/"):
            say(chat.order(line))
        elif line:
            for name, answer in chat.compare(line) if compare else [("", chat.ask(line))]:
                if compare:
                    typer.echo(f"[{name}]")
                _write(answer)
            compare = False


def _message(prompt: str) -> str:
    """What the user writes: a line, or the lines between two marks."""
    line = input(prompt).strip()
    if not line.startswith(_BLOCK):
        return line
    lines = [line.removeprefix(_BLOCK)]
    while not lines[-1].rstrip().endswith(_BLOCK):
        lines.append(input("... " if prompt else ""))
    return "\n".join(lines).rstrip().removesuffix(_BLOCK).strip()


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
