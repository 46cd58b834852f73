"""The processes this package starts: they end with the one that started them, and import nothing from the
folder they are started in.

The first process holds the writing end of a pipe, which nothing is ever written to; the others read from it
in a thread. The system closes it however the first process ends, SIGKILL included, on Linux and on macOS.
"""

import os
import subprocess
import sys
import threading
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
    """In a process that `start` made: from now on end it, at once, when the one that started it has ended."""
    number = os.environ.pop(_LIFELINE, None)  # its own children have other descriptors
    if number is not None:
        threading.Thread(target=_wait, args=(int(number),), daemon=True, name="lifeline").start()


def _wait(descriptor: int) -> None:
    os.read(descriptor, 1)
    os._exit(1)
