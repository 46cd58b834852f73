"""`eval --processes N`: the items shared among processes, each with its own model and its part of the cores.

While a batch is decoded on a CPU a quarter of the time goes into work of one core; in two processes it goes
on beside the other's. On two cores answers come 1.3 times as fast as in one process, with beams 1.4 times.
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
from mlx_adapters.cpu import blas, children, cores, threads
from mlx_adapters.errors import AdaptersError, UnsupportedError

if TYPE_CHECKING:
    from mlx_adapters.evaluate.score import Record
    from mlx_adapters.evaluate.tasks import Item, Task

__all__ = ["Workers", "processes_for"]

_MANY = 128  # items; with fewer, loading the model twice takes what is won


def processes_for(folder: Path, items: int) -> int:
    """Two, where they pay and a second model leaves most of the free memory; otherwise one.

    Not on a GPU, which one process keeps busy, nor where the environment says how many cores to use, nor
    where other programs leave no second core.
    """
    if not device.on_cpu() or cores.count() < 2 or cores.limited() or items < _MANY:
        return 1
    from mlx_adapters.files.weights import weight_files
    from mlx_adapters.models.load import read_config  # late: a worker first hides torch from it

    stored = sum(file.stat().st_size for file in weight_files(folder))
    written_out = stored * (8 if "quantization" in read_config(folder) else 2)  # float32 at most
    if 4 * written_out >= device.free_memory():
        return 1
    return 2 if threads.most() <= 1 or threads.settle() > 1 else 1


class Workers:
    """`count` processes that have loaded the model and the adapter; close them, or use `with`.

    Raises what loading raises; UnsupportedError where a process dies, for want of memory, say.
    """

    def __init__(self, model: str | Path, adapter: Path | None, count: int) -> None:
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        blas.warn_if_slow()
        try:
            for _ in range(count):
                self._start(str(model), adapter, count)
        except BaseException:
            self.close()
            raise

    def _start(self, model: str, adapter: Path | None, count: int) -> None:
        """One more process. It is ready before the next begins: each looks how much memory is left."""
        ours, theirs = Pipe()
        hides_torch = "torch" in sys.modules and sys.modules["torch"] is None
        process = children.start(
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

    def records(
        self,
        items: "Sequence[Item]",
        task: "Task | str",
        *,
        done: frozenset[int] = frozenset(),
        **options: Any,
    ) -> "Iterator[Record]":
        """What `answered` yields with these options."""
        left = [index for index in range(len(items)) if index not in done]
        for rank, connection in enumerate(self._connections):
            own = set(left[rank :: len(self._connections)])
            others = frozenset(index for index in range(len(items)) if index not in own)
            with suppress(ConnectionError):  # one that has ended: receiving says so
                connection.send((list(items), task, options | {"done": others}))
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
            place = self._connections.index(connection)
            code = self._processes[place].wait()
            raise UnsupportedError(
                f"process {place} of {len(self._processes)} ended ({_reason(code)}). If memory ran out, use "
                "fewer --processes"
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


def _reason(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _work(connection: Connection) -> None:
    """Load, say so with None, then answer job after job, each ended by None. Errors go to the parent."""
    model, adapter, hides_torch = connection.recv()
    if hides_torch:
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    from mlx_adapters import adapter as adapters
    from mlx_adapters.evaluate.score import answered
    from mlx_adapters.models import load as models

    try:
        loaded = models.load(model, answering=True)
        if adapter is not None:
            adapters.load(loaded, adapter)
        connection.send(None)
        while True:
            items, task, options = connection.recv()
            for record in answered(loaded.model, loaded.tokenizer, items, task, **options):
                connection.send(record)
            connection.send(None)
    except AdaptersError as error:
        connection.send(error)


if __name__ == "__main__":
    children.follow()
    with suppress(EOFError, ConnectionError):  # the parent has ended
        _work(Connection(int(sys.argv[1])))
