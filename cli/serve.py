"""`mlx-adapters serve MODEL --adapter NAME=DIR`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_adapters.cli.options import named_folders
from mlx_adapters.cli.screen import say
from mlx_adapters.cli.signals import instead
from mlx_adapters.errors import ConfigError

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(help="model folder or hub id")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER, or a folder that gives its name; may be repeated")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen at; there is no password")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8080,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer a request may ask for")] = 2048,
    parallel: Annotated[int, typer.Option(min=1, help="answers written at once; the others wait")] = 8,
) -> None:
    """Serve the base and its adapters by OpenAI's API.

    A request's `model` names which of them answers. A field that is not supported is refused by its name.
    """
    import threading

    from mlx_adapters.adapter.multi import load_adapters
    from mlx_adapters.models import load as models
    from mlx_adapters.serve import Engine, Server

    name = Path(model).resolve().name if Path(model).is_dir() else model
    folders = named_folders(adapter or [], name)
    loaded = models.load(model, answering=True)
    metas = load_adapters(loaded, folders) if folders else {}
    engine = Engine(loaded, metas, name=name, parallel=parallel)
    try:
        server = Server(engine, host, port, max_tokens=max_tokens)
    except OSError as error:
        raise ConfigError(f"cannot listen at {host} port {port} ({error.strerror or error})") from None
    instead(engine.stop)
    # the arrays are this thread's: it answers, and HTTP goes to others
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shown = f"[{host}]" if ":" in host else host
    say(f"http://{shown}:{server.server_port}/v1 serves {', '.join(engine.models)}; Ctrl-C stops")
    try:
        engine.run()
    finally:
        server.shutdown()
        server.drain(1.0)
        server.server_close()
    say("stopped")
