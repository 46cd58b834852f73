"""`mlx-adapters serve MODEL --adapter NAME=DIR`."""

import threading
from pathlib import Path
from typing import Annotated

from mlx_adapters.cli.options import Adapters, Model, load_named, opt
from mlx_adapters.cli.screen import say
from mlx_adapters.cli.signals import instead
from mlx_adapters.errors import ConfigError


def command(
    model: Model,
    adapter: Adapters = None,
    host: Annotated[str, opt("address to listen at; there is no password")] = "127.0.0.1",
    port: Annotated[int, opt("0 takes a free one", min=0, max=65535)] = 8080,
    max_tokens: Annotated[int, opt("longest answer a request may ask for", min=1)] = 2048,
    parallel: Annotated[int, opt("requests that are answered at the same time", min=1)] = 8,
) -> None:
    """Serve the base and its adapters by OpenAI's API.

    A request's `model` names which of them answers. A field that is not supported is refused by its name.
    """
    from mlx_adapters.serve import Engine, Server

    name = Path(model).resolve().name if Path(model).is_dir() else model
    engine = Engine(*load_named(model, adapter, base=name), name=name, parallel=parallel)
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
