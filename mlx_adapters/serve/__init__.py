"""An OpenAI-compatible server of one base and its adapters, chosen by each request's `model`.

mlx-lm's server is not built upon: it reloads the base for another adapter, calls the model without virtual
tokens or a cache that starts full, and reads a question through the chat template whatever the adapter was
trained with. Here the adapters share one base and are switched in place between tokens.

    engine.py    the one thread that owns the arrays: takes turns among the requests
    requests.py  what a request may ask, checked
    server.py    HTTP: routes, streaming, errors
    page.py      the page of `chat --web`
"""

from mlx_adapters.serve.engine import Engine
from mlx_adapters.serve.requests import CompletionRequest, RequestError
from mlx_adapters.serve.server import Server

__all__ = ["CompletionRequest", "Engine", "RequestError", "Server"]
