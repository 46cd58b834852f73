"""`eval --processes N`: the items shared among processes, each with its own model and its part of the cores.

While a batch is decoded on a CPU a quarter of the time goes into work of one core; in two processes it runs
beside the other's. On two cores answers come 1.3 times as fast as in one process, with beams 1.4 times.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_adapters import device
from mlx_adapters.cpu import blas, cores, processes, threads
from mlx_adapters.errors import AdaptersError, UnsupportedError

if TYPE_CHECKING:
    from mlx_adapters.evaluate.ask import Asking
    from mlx_adapters.evaluate.score import Record
    from mlx_adapters.evaluate.tasks import Item, Task

__all__ = ["Workers", "processes_for"]

_FEWEST_ITEMS = 128  # below this, loading a second model costs more than it saves


def processes_for(folder: Path, items: int) -> int:
    """Two where they pay and a second model leaves most of the free memory; otherwise one.

    One on a GPU, which one process keeps busy, where the environment says how many cores to use, and where
    other programs leave no second core.
    """
    if not device.on_cpu() or cores.count() < 2 or cores.limited() or items < _FEWEST_ITEMS:
        return 1
    from mlx_adapters.files.weights import weight_files
    from mlx_adapters.models.load import read_config  # late: a worker first hides torch from it

    stored = sum(file.stat().st_size for file in weight_files(folder))
    dense = stored * (8 if "quantization" in read_config(folder) else 2)  # in float32, at most
    if 4 * dense >= device.free_memory():
        return 1
    return 2 if threads.most() <= 1 or threads.settle() > 1 else 1


class Workers:
    """`count` processes that have loaded the model and the adapter; close them, or use `with`.

    Raises what loading raises; UnsupportedError where a process dies, for example for want of memory.
    """

    def __init__(self, model: str | Path, adapter: str | Path | None, count: int) -> None:
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        blas.warn_if_slow()
        try:
            for _ in range(count):
                self._start(model, adapter, count)
        except BaseException:
            self.close()
            raise

    def _start(self, model: str | Path, adapter: str | Path | None, count: int) -> None:
        """One more process. It is ready before the next begins: each looks how much memory is left."""
        ours, theirs = Pipe()
        hides_torch = "torch" in sys.modules and sys.modules["torch"] is None
        process = processes.start(
            "mlx_adapters.evaluate.workers",
            [str(theirs.fileno())],
            env=cores.share(count) | os.environ,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        self._connections.append(ours)
        self._processes.append(process)
        with suppress(ConnectionError):
            ours.send((model, adapter, hides_torch))
        self._receive(ours)

    def answer(
        self, task: "Task", items: "Sequence[Item]", asking: "Asking", *, done: frozenset[int] = frozenset()
    ) -> "Iterator[Record]":
        """What `ask.answer` yields."""
        left = [index for index in range(len(items)) if index not in done]
        for rank, connection in enumerate(self._connections):
            others = frozenset(range(len(items))) - frozenset(left[rank :: len(self._connections)])
            with suppress(ConnectionError):  # one that has ended: receiving says so
                connection.send((task, list(items), asking, others))
        busy = list(self._connections)
        while busy:
            ready = wait(busy)
            for connection in [one for one in busy if one in ready]:
                record = self._receive(connection)
                if record is None:
                    busy.remove(connection)
                else:
                    yield record

    def _receive(self, connection: Connection) -> Any:
        try:
            found = connection.recv()
        except (EOFError, ConnectionError):
            rank = self._connections.index(connection)
            code = self._processes[rank].wait()
            raise UnsupportedError(
                f"process {rank} of {len(self._processes)} ended ({processes.ending(code)}). If memory ran "
                "out, use fewer --processes"
            ) from None
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.terminate()
        for process, connection in zip(self._processes, self._connections):
            process.wait()
            connection.close()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _work(connection: Connection) -> None:
    """Load, say so with None, then answer job after job, each ended by None. Errors go to the parent."""
    model, adapter, hides_torch = connection.recv()
    if hides_torch:
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    from mlx_adapters import adapter as adapters
    from mlx_adapters.evaluate.ask import answer
    from mlx_adapters.models import load as models

    try:
        loaded = models.load(model, answering=True)
        if adapter is not None:
            adapters.load(loaded, Path(adapter))
        connection.send(None)
        while True:
            task, items, asking, done = connection.recv()
            for record in answer(loaded.model, loaded.tokenizer, task, items, asking, done=done):
                connection.send(record)
            connection.send(None)
    except AdaptersError as error:
        connection.send(error)


if __name__ == "__main__":
    processes.follow()
    with suppress(EOFError, ConnectionError):  # the parent has ended
        _work(Connection(int(sys.argv[1])))
