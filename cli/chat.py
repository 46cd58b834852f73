"""`mlx-adapters chat MODEL`: talk to a model and its adapters in the terminal."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_adapters.cli import complete
from mlx_adapters.cli.options import json_object, named_folders
from mlx_adapters.cli.screen import say
from mlx_adapters.cli.signals import instead, telling
from mlx_adapters.errors import AdaptersError, ConfigError, counted

if TYPE_CHECKING:
    from mlx_adapters.adapter import AdapterMeta
    from mlx_adapters.models.load import LanguageModel

__all__ = ["command"]

_HELP = """/adapter NAME   answer with that adapter; /adapter off: the base
/compare        the next message answered by the base and by each adapter
/reset          forget the conversation
/save FILE      write the conversation as JSON
/help           this; Ctrl-C stops an answer, Ctrl-D ends"""


def command(
    model: Annotated[str, typer.Argument(help="model folder or hub id")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER, or a folder that gives its name; may be repeated")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="default: the adapter's, else chat if there is one, else plain",
            autocompletion=complete.templates,
        ),
    ] = None,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(help="variables of the chat template: '{\"enable_thinking\": false}'")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="of a temperature above 0")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="seed of the sampling [default: a new one each time]")
    ] = None,
    web: Annotated[bool, typer.Option("--web", help="a page in the browser instead (extra `web`)")] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="of --web, at 127.0.0.1")] = 7860,
) -> None:
    """Chat in the terminal; adapters are switched in place. Type /help there."""
    from mlx_adapters.adapter.multi import load_adapters
    from mlx_adapters.data.templates import TEMPLATES
    from mlx_adapters.errors import unknown
    from mlx_adapters.models import load as models

    if template is not None and template not in TEMPLATES:
        raise ConfigError(unknown("template", template, TEMPLATES))
    if web and template is not None:
        raise ConfigError("--web reads every adapter through its own template: leave --template out")
    kwargs = json_object(chat_template_kwargs, "--chat-template-kwargs")
    folders = named_folders(adapter or [], "base")
    loaded = models.load(model, answering=True)
    metas = load_adapters(loaded, folders) if folders else {}
    loaded.model.eval()
    if web:
        asked = {"temperature": temperature, "top_p": top_p, "seed": seed, "template_kwargs": kwargs}
        _page(loaded, metas, port, max_tokens=max_tokens, **asked)
        return
    with telling(""):
        _loop(_Chat(loaded, metas, template, max_tokens, temperature, top_p, seed=seed, kwargs=kwargs))


def _page(loaded: "LanguageModel", metas: "dict[str, AdapterMeta]", port: int, **settings: Any) -> None:
    """The page's threads ask; this one, which loaded the model, answers until Ctrl-C."""
    from mlx_adapters.serve import Engine
    from mlx_adapters.serve.page import build, start

    engine = Engine(loaded, metas, name="base")
    page = build(engine, title=f"{loaded.path.name} with mlx-adapters", **settings)
    try:
        address = start(page, host="127.0.0.1", port=port)
    except OSError:
        raise ConfigError(f"port {port} is taken: give another with --port") from None
    instead(engine.stop)
    say(f"{address} answers as {', '.join(engine.models)}; Ctrl-C stops")
    try:
        engine.run()
    finally:
        page.close(verbose=False)
    say("stopped")


class _Chat:
    """A conversation, and the cache of what the model has read of it."""

    def __init__(
        self,
        loaded: "LanguageModel",
        metas: "dict[str, AdapterMeta]",
        template: str | None,
        max_tokens: int,
        temperature: float,
        top_p: float,
        *,
        seed: int | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        from mlx_adapters.generate.sampling import fresh_seed, sampler

        self.loaded, self.metas, self.template, self.max_tokens = loaded, metas, template, max_tokens
        self.kwargs = kwargs
        self.sampler = sampler(fresh_seed() if seed is None else seed, temperature=temperature, top_p=top_p)
        self.turns: list[dict[str, str]] = []
        self.forget()
        if metas:
            self.use(next(iter(metas)))

    def forget(self) -> None:
        """Drop the cache: another adapter would have filled it otherwise."""
        self.cache: list[Any] | None = None
        self.read: list[int] = []
        self._front = 0

    @property
    def name(self) -> str:
        from mlx_adapters.adapter.multi import active

        return (active(self.loaded.model) or ("base",))[0]

    def use(self, name: str | None) -> None:
        from mlx_adapters.adapter.multi import activate

        if self.metas:
            activate(self.loaded.model, name)
        elif name is not None:
            raise ConfigError(f"no adapter {name!r}: start with --adapter FOLDER")
        self.forget()

    def answer(self, show: Callable[[str], None]) -> str:
        """Answer the last turn, shown piece by piece; what Ctrl-C leaves is the answer."""
        from mlx_adapters.generate.stream import stream

        text, ids = "", self._ids()
        fresh = self._continue(ids)
        self.read = ids
        try:
            for piece in stream(
                self.loaded.model,
                self.loaded.tokenizer,
                fresh,
                prompt=ids,
                max_tokens=self.max_tokens,
                sampler=self.sampler,
                cache=self.cache,
            ):
                text += piece.text
                show(piece.text)
        except KeyboardInterrupt:
            self.forget()  # how far the cache got is not known
        return text

    def _continue(self, ids: list[int]) -> list[int]:
        """The tokens the model has not read yet, with the cache cut back to what it shares with `ids`."""
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

        from mlx_adapters.adapter.call import before_text, start_cache, virtual_ids, with_virtual
        from mlx_adapters.models.limits import check_length

        model = self.loaded.model
        row = with_virtual(model, ids, self.loaded.tokenizer)
        check_length(model, len(ids) + before_text(model), self.max_tokens)
        same = 0
        while same < min(len(self.read), len(ids) - 1) and self.read[same] == ids[same]:
            same += 1
        if self.cache is not None and same and can_trim_prompt_cache(self.cache):
            front = self._front + len(virtual_ids(model))
            trim_prompt_cache(self.cache, self.cache[0].offset - front - same)
            if self.cache[0].offset == front + same:
                return ids[same:]
        self.cache = start_cache(model) or make_prompt_cache(model)
        self._front = int(self.cache[0].offset) if hasattr(self.cache[0], "offset") else 0
        return row

    def _ids(self) -> list[int]:
        from mlx_adapters.data.templates import chosen_template, conversation
        from mlx_adapters.data.tokens import prompt_ids

        tokenizer, meta = self.loaded.tokenizer, self.metas.get(self.name)
        trained = meta.template if meta else None
        template = chosen_template(self.template, trained, self.loaded.template, tokenizer=tokenizer)
        text = conversation(self.turns, template=template, tokenizer=tokenizer, kwargs=self.kwargs)
        return prompt_ids(text, tokenizer)


def _loop(chat: _Chat) -> None:
    import signal
    import sys

    # a shell starts what it puts in the background with Ctrl-C ignored, and Python keeps that; Ctrl-C ends an
    # answer here, not the program: nothing is told
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
        if not line:
            continue
        if line == "/compare":
            compare = True
            say("the next message is answered by all")
        elif line.startswith("/"):
            _order(chat, line)
        elif compare:
            compare = False
            _compare(chat, line)
        else:
            _say(chat, line)


def _say(chat: _Chat, line: str) -> None:
    chat.turns.append({"role": "user", "content": line})
    try:
        text = chat.answer(lambda piece: typer.echo(piece, nl=False))
    except AdaptersError as error:
        chat.turns.pop()
        say(f"error: {error}")
        return
    typer.echo()
    chat.turns.append({"role": "assistant", "content": text})


def _compare(chat: _Chat, line: str) -> None:
    """The base and every adapter on the same conversation, which stays as it was."""
    before, turns = chat.name, list(chat.turns)
    for name in [None, *chat.metas]:
        chat.use(name)
        chat.turns = list(turns)
        typer.echo(f"[{name or 'base'}]")
        _say(chat, line)
    chat.turns = turns
    chat.use(None if before == "base" else before)


def _order(chat: _Chat, line: str) -> None:
    from mlx_adapters.study.cells import write_json

    word, _, rest = line.partition(" ")
    rest = rest.strip()
    try:
        if word == "/help":
            typer.echo(_HELP)
        elif word == "/adapter" and rest:
            chat.use(None if rest == "off" else rest)
            say(f"now: {chat.name}")
        elif word == "/adapter":
            say(f"adapters: {', '.join(chat.metas) or 'none'}; now: {chat.name}")
        elif word == "/reset":
            chat.turns = []
            chat.forget()
            say("forgotten")
        elif word == "/save" and rest:
            write_json(Path(rest), chat.turns)
            say(f"{rest}: {counted(len(chat.turns), 'turn')}")
        else:
            say(f"unknown command {word}: /help lists them")
    except (AdaptersError, OSError) as error:
        say(f"error: {error}")
