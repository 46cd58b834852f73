"""`mlx-adapters serve MODEL --adapter NAME=DIR`."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mlx_adapters import signals
from mlx_adapters.cli.options import Adapters, ChatTemplateKwargs, Model, Template, opt
from mlx_adapters.screen import say

if TYPE_CHECKING:
    from mlx_adapters.serve import Engine


def command(
    model: Model,
    adapter: Adapters = None,
    host: Annotated[str, opt("address to listen at; there is no password")] = "127.0.0.1",
    port: Annotated[int, opt("0 takes a free one", min=0, max=65535)] = 8080,
    max_tokens: Annotated[int, opt("longest answer a request may ask for", min=1)] = 2048,
    parallel: Annotated[int, opt("requests that are answered at the same time", min=1)] = 8,
    template: Template = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Serve the base and its adapters by OpenAI's API.

    A request's `model` names which of them answers. A field that is not supported is refused by its name.
    """
    from mlx_adapters.adapter.multi import load_named
    from mlx_adapters.serve import Engine
    from mlx_adapters.serve.server import serving

    name = Path(model).resolve().name if Path(model).is_dir() else model
    given: dict[str, Any] = {"template": template, "chat_template_kwargs": chat_template_kwargs}
    engine = Engine(*load_named(model, adapter or (), base=name), name=name, parallel=parallel, **given)
    until_stopped(engine, serving(engine, host, port, max_tokens=max_tokens), "serves")


def until_stopped(engine: "Engine", opened: AbstractContextManager[str], what: str) -> None:
    """Let others ask at the address of `opened`, and answer in this thread until Ctrl-C."""
    with opened as address:
        signals.instead(engine.stop)
        say(f"{address} {what} {', '.join(engine.models)}; Ctrl-C stops")
        engine.run()
    say("stopped")
