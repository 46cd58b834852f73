"""The processes this package starts: they end with the one that started them, and import nothing from the
folder they are started in.

The first process holds the writing end of a pipe, which nothing is ever written to; the others read from it
in a thread. The system closes it however the first process ends, SIGKILL included, on Linux and on macOS.
The processes of `mlx.launch` have no such pipe: they ask once a second who their parent is.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

__all__ = ["follow", "start"]

_LIFELINE = "MLX_ADAPTERS_LIFELINE"  # the descriptor of the reading end
_pipe: tuple[int, int] | None = None


def start(
    module: str,
    arguments: Sequence[str],
    *,
    env: dict[str, str],
    pass_fds: tuple[int, ...] = (),
    **options: Any,
) -> subprocess.Popen[bytes]:
    """Run a module of ours, which must call `follow`, in a new session: Ctrl-C is for this process alone."""
    global _pipe
    _pipe = _pipe or os.pipe()
    return subprocess.Popen(
        # -P: otherwise a json.py in the current folder would be run instead of Python's
        [sys.executable, "-P", "-m", module, *arguments],
        env=env | {_LIFELINE: str(_pipe[0])},
        pass_fds=(*pass_fds, _pipe[0]),
        start_new_session=True,
        **options,
    )


def follow() -> None:
    """From now on this process ends, at once, when the one that started it among others has ended."""
    number = os.environ.pop(_LIFELINE, None)  # its own children have other descriptors
    if number is not None:
        threading.Thread(target=_read, args=(int(number),), daemon=True, name="lifeline").start()
    elif "MLX_RANK" in os.environ:
        threading.Thread(target=_ask, args=(os.getppid(),), daemon=True, name="lifeline").start()


def _read(descriptor: int) -> None:
    os.read(descriptor, 1)
    os._exit(1)


def _ask(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
