"""How long something may take, and how much memory it took at most."""

import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Hung(BaseException):
    """Five seconds have passed. No `except Exception` of a reader may swallow it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Count the most memory anew: a process that has held a lot would hide a reader's share.

    Linux alone can; elsewhere the most since the start of the process is compared.
    """
    with suppress(OSError), open("/proc/self/clear_refs", "w") as counters:
        counters.write("5")
