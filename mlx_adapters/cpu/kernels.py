"""Where `mlx.compile` keeps what it compiles on a CPU: a folder per process."""

import fcntl
import itertools
import os
import struct
import sys
import tempfile
from pathlib import Path

from mlx_adapters import device
from mlx_adapters.cpu.blas import cache

__all__ = ["own_kernels"]

_kernels: int | None = None  # the open folder of `own_kernels`: locked until this process ends


def own_kernels() -> None:
    """Give this process a folder of its own for what `mx.compile` makes on a CPU, kept for later processes.

    MLX writes there without locks: two processes at once would load each other's half-written libraries, and
    one that is killed leaves such a library for all who come later. What other processes' folders have is
    taken over: a library takes a second to compile. Never raises.
    """
    global _kernels
    if _kernels is not None or not device.on_cpu():
        return
    try:
        for number in itertools.count():
            folder = cache() / f"kernels-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            _kernels = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(_kernels, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another process's, as long as it lives
                os.close(_kernels)
                continue
            break
        for library in folder.rglob("*.so"):
            if not _whole(library):
                library.unlink()
        _take_over(folder)
        tempfile.gettempdir()  # Python's own temporary files stay where they were
        os.environ["TMPDIR"] = str(folder)
    except (OSError, RuntimeError):
        pass  # no home, no place to write, or no locks: MLX's own folder then


def _take_over(folder: Path) -> None:
    """Link the finished libraries of the other folders that this one lacks, whose names say what they do."""
    for library in folder.parent.glob("kernels-*/**/*.so"):
        own = folder.joinpath(*library.relative_to(folder.parent).parts[1:])
        if not own.exists() and _whole(library):
            own.parent.mkdir(parents=True, exist_ok=True)
            own.hardlink_to(library)


def _whole(library: Path) -> bool:
    """Whether an ELF file is there to its end: linkers write its header last."""
    if sys.platform != "linux":
        return True
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    (table,), (size, entries) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return bool(library.stat().st_size >= table + size * entries)
