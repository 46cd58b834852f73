"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal) save and end; they are answered at once, also where native
code computes.

Python runs a handler between two of its own instructions, so not before a training step or a long prompt is
done, which may take a minute. But the system's part of the handling writes the signal's number into a pipe at
once. A thread reads it, and where no handler has run a moment later it tells the user that Ctrl-C was heard.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Stopped", "answered", "instead", "listen", "telling"]

_MOMENT = 0.1  # seconds
_words = "stopping ..."
_say: Callable[[str], None] = print
_answered = 0.0  # when a handler ran last
_told = False
_listening = False


class Stopped(KeyboardInterrupt):
    """Ctrl-C ended the work in good order, and the user has been told: nothing is left to say."""


def listen(say: Callable[[str], None]) -> None:
    """From now on these signals raise KeyboardInterrupt, and where that takes time `say` tells the user."""
    global _listening, _say
    _say = say
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, _as_interrupt)
    if "MLX_RANK" not in os.environ:  # a process among others must end at once when the launcher says so
        signal.signal(signal.SIGTERM, _as_interrupt)
    if _listening:
        return
    _listening = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reading,), daemon=True, name="signals").start()


def answered() -> bool:
    """For handlers to call: whether the user has been told already."""
    global _answered, _told
    told, _told, _answered = _told, False, time.monotonic()
    return told


def instead(act: Callable[[], None]) -> None:
    """From now on these signals call `act`."""

    def handle(number: int, frame: Any) -> None:
        answered()
        act()

    for number in (signal.SIGINT, signal.SIGTERM):  # SIGHUP is passed on as SIGINT
        signal.signal(number, handle)


@contextmanager
def telling(words: str) -> Iterator[None]:
    """What to say inside the block; empty: nothing."""
    global _words
    before, _words = _words, words
    try:
        yield
    finally:
        _words = before


def _listen(descriptor: int) -> None:
    global _told
    while True:
        numbers = os.read(descriptor, 64)
        heard = time.monotonic()
        if not {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} & set(numbers):
            continue
        time.sleep(_MOMENT)
        if _answered < heard - _MOMENT and _words and not _told:
            _told = True
            _say(_words)


def _interrupt(number: int, frame: Any) -> None:
    answered()
    raise KeyboardInterrupt


def _as_interrupt(number: int, frame: Any) -> None:
    """As Ctrl-C, also where the shell has Ctrl-C ignored."""
    if number == signal.SIGHUP:  # the shell sends one and the system another: that is no second Ctrl-C
        signal.signal(number, signal.SIG_IGN)
    if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, signal.SIG_DFL, None):
        _interrupt(number, frame)
    signal.raise_signal(signal.SIGINT)
