"""A process that has everything imported, and answers for `mlx-adapters` and for the docs' Python blocks.

    python tests/support/warm.py SOCKET         serves, one request after the other, in its main thread
    ask(SOCKET, ["cli", ...])           runs a command there; "run" takes code, and keeps its names

Starting Python and importing MLX and torch takes seconds, and the docs have a hundred commands. The caller's
stdin, stdout and stderr are handed over as they are, and its folder: redirection and pipes work.
"""

import json
import os
import socket
import sys
import types
from pathlib import Path

__all__ = ["ask"]

_STREAMS = (0, 1, 2)


def ask(address: str, words: list[str], streams: tuple[int, int, int] = _STREAMS) -> int:
    """Send a request and wait: the exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        body = json.dumps({"words": words, "folder": os.getcwd()}).encode()
        socket.send_fds(connection, [len(body).to_bytes(4, "big")], list(streams))
        connection.sendall(body)
        return int.from_bytes(_exactly(connection, 1), "big")


def _serve(address: str) -> None:
    sys.path.insert(0, "")  # a script's folder is not the reader's: theirs is the one they are in
    sys.path.remove(str(Path(__file__).parent))
    import torch  # noqa: F401  # some commands hide it from transformers, for good: not in a process for all of them

    from mlx_adapters.cli import app  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    while True:
        connection, _ = listener.accept()
        with connection:
            size, streams, _, _ = socket.recv_fds(connection, 4, 3)
            request = json.loads(_exactly(connection, int.from_bytes(size, "big")))
            os.chdir(request["folder"])
            kept = [os.dup(stream) for stream in _STREAMS]
            _become(streams)
            code = _answer(request["words"])
            _become(kept)
            connection.sendall(code.to_bytes(1, "big"))


def _answer(words: list[str]) -> int:
    import traceback

    from mlx_adapters.cli.app import main

    kind, *rest = words
    try:
        if kind == "cli":
            sys.argv = ["mlx-adapters", *rest]
            main()
        elif kind == "new":  # another page: another reader, who has imported and defined nothing
            sys.modules["__main__"] = types.ModuleType("__main__")
        else:
            exec(compile(rest[0], rest[1], "exec"), sys.modules["__main__"].__dict__)
    except SystemExit as end:
        return int(end.code or 0) if not isinstance(end.code, str) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _become(streams: list[int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for number, stream in zip(_STREAMS, streams, strict=True):
        os.dup2(stream, number)
        os.close(stream)


def _exactly(connection: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        more = connection.recv(count - len(got))
        if not more:
            raise ConnectionError("the warm process ended before it answered")
        got += more
    return got


if __name__ == "__main__":
    if sys.argv[1] == "--ask":
        sys.exit(ask(sys.argv[2], sys.argv[3:]))
    _serve(sys.argv[1])
