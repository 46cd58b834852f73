"""Ctrl-C ends a run between two steps, where model and optimizer agree."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["stop_on_interrupt"]


@contextmanager
def stop_on_interrupt(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Ctrl-C calls `stop` inside the block; a second one raises KeyboardInterrupt too.

    Yields the list of the signals that came. Outside the main thread, where Python handles none, nothing
    changes.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop()
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
