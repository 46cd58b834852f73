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
from functools import partial
from pathlib import Path
from typing import Any

from mlx_adapters.cli.screen import say
from mlx_adapters.cli.signals import answered
from mlx_adapters.cpu import blas, children, cores

__all__ = ["launched", "supervise"]

_GRACE = 10.0  # seconds for the others to end by themselves


def launched() -> bool:
    """Whether this process is one of those that `supervise` or `mlx.launch` started."""
    return "MLX_RANK" in os.environ


def supervise(arguments: list[str], count: int) -> int:
    """Run `mlx-adapters` with these arguments in `count` processes, wait, and return their exit code.

    Signals are passed on to all of them; where one fails the others are ended. The first one speaks: an error
    in the input is met by all. What another says is shown where it ended otherwise than the first.
    """
    blas.warn_if_slow()
    with tempfile.TemporaryDirectory() as scratch:
        hosts = Path(scratch) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]))
        shared = cores.share(count) | os.environ
        started: list[subprocess.Popen[bytes]] = []
        with ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:  # nohup
                    continue
                stack.callback(signal.signal, number, signal.getsignal(number))
                signal.signal(number, partial(_interrupt, started))
            for rank in range(count):
                place = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
                quiet: dict[str, Any] = {}
                if rank:
                    errors = stack.enter_context((Path(scratch) / f"errors-{rank}").open("wb"))
                    quiet = {"stdout": subprocess.DEVNULL, "stderr": errors}
                started.append(children.start("mlx_adapters.cli.app", arguments, env=shared | place, **quiet))
            code = _wait(started)
        for rank, process in enumerate(started[1:], start=1):
            said = (Path(scratch) / f"errors-{rank}").read_text(errors="replace").strip()
            if said and process.returncode > 0 and process.returncode != started[0].returncode:
                say(f"process {rank} of {count}: {said}")
        return code


def _wait(started: list[subprocess.Popen[Any]]) -> int:
    while all(child.poll() in (None, 0) for child in started):
        if all(child.poll() == 0 for child in started):
            return 0
        time.sleep(0.1)
    deadline = time.monotonic() + _GRACE
    died = next((n for n, child in enumerate(started) if (child.poll() or 0) < 0), None)
    if died is not None:
        say(f"process {died} of {len(started)} died (signal {-started[died].returncode}): the run ends")
        deadline = 0.0
    while any(child.poll() is None for child in started) and time.monotonic() < deadline:
        time.sleep(0.1)
    _send(started, signal.SIGTERM)
    for child in started:
        child.wait()
    codes = [child.returncode for child in started if child.returncode > 0]
    return codes[0] if codes and died is None else 1


def _interrupt(started: list[subprocess.Popen[Any]], number: int, frame: Any) -> None:
    if number == signal.SIGHUP:  # see cli/signals.py
        signal.signal(number, signal.SIG_IGN)
    answered()
    _send(started, signal.SIGINT)


def _send(started: list[subprocess.Popen[Any]], number: int) -> None:
    for child in started:
        if child.poll() is None:
            child.send_signal(number)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]
