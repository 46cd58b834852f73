"""Streams that people read: their text is made harmless, and they may be closed at any time."""

import os
import select
from typing import IO, Any

__all__ = ["Patient", "deaf", "drop", "plain"]


def plain(text: str) -> str:
    """The text without what a terminal would act on: a file's names may hold its control sequences."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def deaf(stream: IO[str]) -> bool:
    """Whether nobody reads the stream any more; what is still to be written is dropped then."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # no file: that of a test
        return False
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        drop(stream)
    return gone


def drop(stream: IO[str]) -> None:
    """Let what is written to the stream vanish; Python would complain at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Patient:
    """A stream that takes what is written also where nobody reads it any more."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write the text, or drop it; the number of its characters."""
        try:
            self.stream.write(text)
        except OSError:
            drop(self.stream)
        return len(text)

    def flush(self) -> None:
        """Write what is still waiting."""
        try:
            self.stream.flush()
        except OSError:
            drop(self.stream)
