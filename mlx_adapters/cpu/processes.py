"""The processes this package starts: started, supervised and ended in one place.

They end with the process that started them, and import nothing from the current folder. The first process
holds the writing end of a pipe that nothing is ever written to; the others read from it in a thread. The
system closes it however the first process ends, SIGKILL included, on Linux and on macOS. The processes of
`mlx.launch` have no such pipe: once a second they ask who their parent is.

Three callers stand on this module: `train --processes` (`run_ring`), `eval --processes`
(`evaluate/workers.py`) and `study --jobs` (`run_each`).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from mlx_adapters import signals
from mlx_adapters.cpu import blas, cores

__all__ = ["ending", "follow", "in_ring", "run_each", "run_ring", "send", "start"]

Process = subprocess.Popen[bytes]

_LIFELINE = "MLX_ADAPTERS_LIFELINE"  # the descriptor of the reading end
_GRACE = 10.0  # seconds in which the other processes of a ring may end by themselves
_pipe: tuple[int, int] | None = None


def start(
    module: str,
    arguments: Sequence[str],
    *,
    env: dict[str, str],
    pass_fds: tuple[int, ...] = (),
    stdin: int | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
) -> Process:
    """Run one of this package's modules, which must call `follow`, in a new session, so that Ctrl-C reaches
    the starting process alone."""
    global _pipe
    _pipe = _pipe or os.pipe()
    return subprocess.Popen(
        # -P: otherwise a json.py in the current folder would be run instead of Python's
        [sys.executable, "-P", "-m", module, *arguments],
        env=env | {_LIFELINE: str(_pipe[0])},
        pass_fds=(*pass_fds, _pipe[0]),
        start_new_session=True,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
    )


def follow() -> None:
    """From now on this process ends, at once, when the process that started it has ended."""
    number = os.environ.pop(_LIFELINE, None)  # its own children have other descriptors
    if number is not None:
        threading.Thread(target=_read, args=(int(number),), daemon=True, name="lifeline").start()
    elif in_ring():
        threading.Thread(target=_ask, args=(os.getppid(),), daemon=True, name="lifeline").start()


def _read(descriptor: int) -> None:
    os.read(descriptor, 1)
    os._exit(1)


def _ask(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def send(processes: Iterable[Process], number: int) -> None:
    """Send a signal to those that still run."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def ending(code: int) -> str:
    """An exit code in words: `signal 9`, `exit code 1`."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"


# Independent jobs -------------------------------------------------------------------------------------------


def run_each(
    module: str,
    jobs: Sequence[tuple[str, Sequence[str], Path]],
    *,
    at_once: int,
    warn: Callable[[str], None],
    stopping: str,
) -> Iterator[tuple[str, int | None]]:
    """Run each job `(name, arguments, log file)` as a process, `at_once` at a time.

    Yields `(name, None)` when a job has started and `(name, exit code)` when it has ended. On Ctrl-C `warn`
    gets the text `stopping`, the jobs get SIGINT, and all are waited for.
    """
    blas.warn_if_slow()
    # each job with as many threads as there are cores would take the others' cores
    env = cores.share(at_once) | os.environ
    waiting, running = list(jobs), dict[str, Process]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name, arguments, file = waiting.pop(0)
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("ab") as log:
                    running[name] = start(module, arguments, env=env, stdout=log, stderr=log)
                yield name, None
            for name in [name for name, process in running.items() if process.poll() is not None]:
                yield name, running.pop(name).returncode
            time.sleep(0.2)
    except KeyboardInterrupt:
        warn(stopping)
        raise
    finally:
        send(running.values(), signal.SIGINT)
        for process in running.values():
            process.wait()


# A ring that shares every batch -----------------------------------------------------------------------------


def in_ring() -> bool:
    """Whether this process is one of those that `run_ring` or `mlx.launch` started."""
    return "MLX_RANK" in os.environ


def run_ring(module: str, arguments: Sequence[str], count: int, *, warn: Callable[[str], None]) -> int:
    """Run the same module in `count` processes that find each other through MLX's ring, as with `mlx.launch`.

    On a CPU about half of a training step is element-wise work on one core; processes that share every batch
    keep the other cores busy too. SIGINT, SIGTERM and SIGHUP are passed on to all processes; where one
    process fails the others are ended. Only the first process writes to the terminal, because an error in the
    input meets all of them; `warn` gets what another one wrote when it ended otherwise than the first.

    Returns: the exit code.
    """
    blas.warn_if_slow()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        hosts = Path(scratch) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]))
        shared = cores.share(count) | os.environ | {"MLX_HOSTFILE": str(hosts)}
        logs = [Path(scratch) / f"errors-{rank}" for rank in range(count)]
        ring: list[Process] = []
        stack.enter_context(_passing_on(ring))
        for rank, log in enumerate(logs):
            env = shared | {"MLX_RANK": str(rank)}
            if rank == 0:
                ring.append(start(module, arguments, env=env))
            else:
                errors = stack.enter_context(log.open("wb"))
                ring.append(start(module, arguments, env=env, stdout=subprocess.DEVNULL, stderr=errors))
        code = _wait(ring, warn)
        for rank in range(1, count):
            text = logs[rank].read_text(errors="replace").strip()
            if text and ring[rank].returncode > 0 and ring[rank].returncode != ring[0].returncode:
                warn(f"process {rank} of {count}: {text}")
        return code


def _wait(ring: list[Process], warn: Callable[[str], None]) -> int:
    while all(process.poll() in (None, 0) for process in ring):
        if all(process.poll() == 0 for process in ring):
            return 0
        time.sleep(0.1)
    deadline = time.monotonic() + _GRACE
    died = next((rank for rank, process in enumerate(ring) if (process.poll() or 0) < 0), None)
    if died is not None:
        warn(f"process {died} of {len(ring)} died ({ending(ring[died].returncode)}): the run ends")
        deadline = 0.0
    while any(process.poll() is None for process in ring) and time.monotonic() < deadline:
        time.sleep(0.1)
    send(ring, signal.SIGTERM)
    for process in ring:
        process.wait()
    codes = [process.returncode for process in ring if process.returncode > 0]
    return codes[0] if codes and died is None else 1


@contextmanager
def _passing_on(ring: list[Process]) -> Iterator[None]:
    """Inside, signals to this process go to the ring as SIGINT."""

    def handle(number: int, frame: Any) -> None:
        if number == signal.SIGHUP:  # the shell sends one and the system another
            signal.signal(number, signal.SIG_IGN)
        signals.answered()
        send(ring, signal.SIGINT)

    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:  # nohup
                continue
            stack.callback(signal.signal, number, signal.getsignal(number))
            signal.signal(number, handle)
        yield


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
