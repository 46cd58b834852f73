"""`train --processes N`: the run as N processes of this machine, each with its share of the cores.

On a CPU about half of a training step is element-wise work on one core; processes that share every batch keep
the others busy too. They find each other through MLX's ring, as with `mlx.launch`.
"""

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlx_adapters import backend
from mlx_adapters.cli.screen import say

__all__ = ["launched", "supervise"]

_GRACE = 10.0  # seconds for the others to end by themselves


def launched() -> bool:
    """Whether this process is one of those that `supervise` or `mlx.launch` started."""
    return "MLX_RANK" in os.environ


def supervise(command: list[str], count: int) -> int:
    """Start the command `count` times, wait, and return its exit code.

    Signals are passed on to all of them; where one fails the others are ended.
    """
    with tempfile.TemporaryDirectory() as scratch:
        hosts = Path(scratch) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]))
        shared = backend.share(count) | os.environ
        children = [
            subprocess.Popen(
                command,
                env=shared | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
                stdout=None if rank == 0 else subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches them through this process alone, once
            )
            for rank in range(count)
        ]
        with ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.getsignal(number))
                signal.signal(number, lambda number, frame: _send(children, signal.SIGINT))
            return _wait(children)


def _wait(children: list[subprocess.Popen[Any]]) -> int:
    while all(child.poll() in (None, 0) for child in children):
        if all(child.poll() == 0 for child in children):
            return 0
        time.sleep(0.1)
    deadline = time.monotonic() + _GRACE
    died = next((n for n, child in enumerate(children) if (child.poll() or 0) < 0), None)
    if died is not None:
        say(f"process {died} of {len(children)} died (signal {-children[died].returncode}): the run ends")
        deadline = 0.0
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    _send(children, signal.SIGTERM)
    for child in children:
        child.wait()
    codes = [child.returncode for child in children if child.returncode > 0]
    return codes[0] if codes and died is None else 1


def _send(children: list[subprocess.Popen[Any]], number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]
