"""One writer at a time: a lock that the kernel frees when its process ends, however it ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_adapters.errors import OutputError

__all__ = ["hold", "locked"]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of the existing `folder`; OutputError while another process holds it.

    The folder itself is locked, so no file is left behind.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        hold(handle, folder)
        yield
    finally:
        os.close(handle)


def hold(handle: int, place: Path) -> None:
    """Lock an open file or folder until it is closed; OutputError, naming `place`, if another process has."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"{place}: another run is writing there. Wait for it, or choose another --output"
        ) from None
    except OSError:  # a file system without locks
        pass
