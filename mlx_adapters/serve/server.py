"""OpenAI's API over HTTP: /v1/models, /v1/completions, /v1/chat/completions, whole or streamed.

A thread for each connection reads the request, hands it to the engine and writes what comes back. Every
error is OpenAI's JSON object with a status; no answer holds a traceback.
"""

import json
import queue
import select
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mlx_adapters.errors import ConfigError
from mlx_adapters.generate.stream import Delta
from mlx_adapters.serve.engine import Engine, Stream
from mlx_adapters.serve.requests import RequestError, parse

__all__ = ["Server", "serving"]

_BODY = 1 << 20  # bytes: far more than a context holds
_CONNECTIONS = 128
_IDLE = 60.0  # seconds a connection may take to send or to read


class Server(ThreadingHTTPServer):
    """Listens at once; `serve_forever` in a thread of its own, `shutdown` and `server_close` at the end."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, engine: Engine, host: str, port: int, *, max_tokens: int = 2048) -> None:
        self.engine, self.max_tokens, self.started = engine, max_tokens, int(time.time())
        self._places = threading.BoundedSemaphore(_CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection; those beyond the limit are closed unread."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Give the place back when the connection ends."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def drain(self, seconds: float) -> None:
        """Wait, at most so long, until every connection has been answered."""
        end = time.monotonic() + seconds
        for _ in range(_CONNECTIONS):
            if not self._places.acquire(timeout=max(0.0, end - time.monotonic())):
                return

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent: a client may go away, and everything else was answered with a status."""


@contextmanager
def serving(engine: Engine, host: str, port: int, *, max_tokens: int) -> Iterator[str]:
    """Inside, requests are taken at the address that it yields; `engine.run`, in this thread, answers them.

    Raises ConfigError where the port is taken or the host is not this machine's.
    """
    try:
        server = Server(engine, host, port, max_tokens=max_tokens)
    except OSError as error:
        raise ConfigError(f"cannot listen at {host} port {port} ({error.strerror or error})") from None
    # the arrays are the calling thread's: it answers, and HTTP goes to others
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shown = f"[{host}]" if ":" in host else host
    try:
        yield f"http://{shown}:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.drain(1.0)
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "mlx-adapters"
    sys_version = ""
    timeout = _IDLE
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: a line for each request would fill the terminal."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        names = self.server.engine.models
        if path == "/health":
            self._json(200, {"status": "ok"})
        elif path == "/v1/models":
            self._json(200, {"object": "list", "data": [self._model(name) for name in names]})
        elif path.startswith("/v1/models/") and path.removeprefix("/v1/models/") in names:
            self._json(200, self._model(path.removeprefix("/v1/models/")))
        else:
            self._error(RequestError(404, f"nothing at {path[:80]}; there is /v1/models"))

    def do_POST(self) -> None:
        stream = None
        try:
            path = self.path.partition("?")[0]
            body = self._body()  # first: an unread body would be taken for the next request
            if path not in ("/v1/completions", "/v1/chat/completions"):
                raise RequestError(
                    404, f"nothing at {path[:80]}; there are /v1/completions and /v1/chat/completions"
                )
            request = parse(body, chat=path.endswith("chat/completions"), max_tokens=self.server.max_tokens)
            stream = self.server.engine.submit(request)
            first = self._next(stream)  # an error before the first delta still gets its status
            if request.stream:
                self._stream(stream, first)
            else:
                self._whole(stream, first)
        except RequestError as error:
            self._error(error)
        except OSError:  # the client went away, or is too slow
            self.close_connection = True
        finally:
            if stream:
                stream.cancelled = True

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.server.started, "owned_by": "mlx-adapters"}

    def _body(self) -> bytes:
        self.close_connection, keep = True, not self.close_connection
        if self.headers.get("Transfer-Encoding"):
            raise RequestError(411, "send the body with a Content-Length, not in chunks")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise RequestError(411, "the header Content-Length must say how many bytes the body has")
        if len(length) > 12 or int(length) > _BODY:
            raise RequestError(413, f"the body is larger than {_BODY} bytes")
        # a page in a browser can send other types to this machine without asking: those are not read
        if self.headers.get_content_type() != "application/json":
            raise RequestError(415, "send the header Content-Type: application/json")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            raise RequestError(408, f"the body did not come within {_IDLE:.0f} seconds") from None
        if len(body) < int(length):
            raise RequestError(400, "the body is shorter than its Content-Length")
        self.close_connection = not keep
        return body

    def _next(self, stream: Stream) -> Delta:
        """The next delta; ConnectionError when nobody waits for it any more."""
        while True:
            if self._gone():
                raise ConnectionError("the client went away")
            try:
                delta = stream.deltas.get(timeout=0.5)
            except queue.Empty:
                continue
            if isinstance(delta, RequestError):
                raise delta
            return delta

    def _gone(self) -> bool:
        """Whether the client has closed: there is something to read, and it is the end."""
        ready = select.select([self.connection], [], [], 0)[0]
        return bool(ready) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def _whole(self, stream: Stream, delta: Delta) -> None:
        texts = [delta.text]
        while delta.reason is None:
            delta = self._next(stream)
            texts.append(delta.text)
        text = "".join(texts)
        choice: dict[str, Any] = {"index": 0, "finish_reason": delta.reason, "logprobs": None}
        choice |= (
            {"message": {"role": "assistant", "content": text}} if stream.request.chat else {"text": text}
        )
        self._json(200, {**self._head(stream, ""), "choices": [choice], "usage": _usage(delta)})

    def _stream(self, stream: Stream, delta: Delta) -> None:
        head = self._head(stream, ".chunk")
        self.close_connection = True  # the end of the stream is the end of the connection
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            role: dict[str, str] = {"role": "assistant"}
            while True:
                self._event({**head, "choices": [_delta(stream, delta, role)]})
                role = {}
                if delta.reason is not None:
                    break
                delta = self._next(stream)
            if stream.request.include_usage:
                self._event({**head, "choices": [], "usage": _usage(delta)})
        except RequestError as error:  # the status is out already
            self._event(_error(error))
        self.wfile.write(b"data: [DONE]\n\n")

    def _head(self, stream: Stream, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if stream.request.chat else "text_completion"
        prefix = "chatcmpl" if stream.request.chat else "cmpl"
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": stream.request.model,
        }

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def _json(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _error(self, error: RequestError) -> None:
        try:
            self._json(error.status, _error(error))
        except OSError:
            self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses (methods, long lines, many headers), as JSON too."""
        self.close_connection = True
        self._error(RequestError(int(code), message or "the request is not valid HTTP"))


def _delta(stream: Stream, delta: Delta, role: dict[str, str]) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": delta.reason, "logprobs": None}
    choice |= {"delta": {**role, "content": delta.text}} if stream.request.chat else {"text": delta.text}
    return choice


def _usage(delta: Delta) -> dict[str, int]:
    return {
        "prompt_tokens": delta.prompt_tokens,
        "completion_tokens": delta.tokens,
        "total_tokens": delta.prompt_tokens + delta.tokens,
    }


def _error(error: RequestError) -> dict[str, Any]:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.field, "code": error.code}}
