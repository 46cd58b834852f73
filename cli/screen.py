"""What the user sees: progress on a terminal, plain lines in a log, and tables."""

import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

# A log gets a line at most this often (seconds), besides the first and the last.
_LOG_EVERY = 10.0


_quiet = False
_live: Any = None  # the bar that is on the screen


def be_quiet() -> None:
    """Say nothing from now on: of the processes of a distributed run one speaks."""
    global _quiet
    _quiet = True


def plain(text: str) -> str:
    """The text without what a terminal would act on: a file's names may hold its control sequences."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """A line about the work, on stderr: stdout is for results. It is printed above the bar, if there is one.

    Nobody may be there to read it (`2>&1 | head`, a closed terminal): the work continues silently.
    """
    if not _quiet:
        _write(text)


def complain(text: str) -> None:
    """An error, the last line: below the bar, and from quiet processes too."""
    if _live is not None:
        _live.stop()
    _write(f"error: {text}")


def _write(text: str) -> None:
    try:
        if _live is not None and _live.live.is_started:
            from rich.text import Text

            _live.console.print(Text(plain(text)), soft_wrap=True)
        else:
            typer.echo(plain(text), err=True)
    except OSError:
        _drop(sys.stderr)


def deaf() -> bool:
    """Whether nobody reads stdout any more; what is still to be printed is dropped then."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # no file: that of a test
        return False
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        _drop(sys.stdout)
    return gone


def _drop(stream: Any) -> None:
    """Let what is written to the stream vanish; Python would complain at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Patient:
    """The stream of a bar, which takes what is written also where nobody reads it any more."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError:
            _drop(self.stream)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            _drop(self.stream)


def table(columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout, each cell as it is: `[cpu]` is text here, not Rich's markup."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        drawn.add_column(Text(column))
    for row in rows:
        drawn.add_row(*(Text(plain(cell)) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.capture() as text:
        console.print(drawn)
    typer.echo(text.get(), nl=False)  # Rich would end the program with 1 where nobody reads it


class Lines:
    """A progress display: `update(done, text)`. Subclasses draw it on a terminal or write it to a log."""

    def update(self, done: int, text: str) -> None:
        raise NotImplementedError


class _Log(Lines):
    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.last = title, total, 0.0

    def update(self, done: int, text: str) -> None:
        now = time.monotonic()
        if done in (1, self.total) or now - self.last >= _LOG_EVERY:
            self.last = now
            say(f"{self.title} {done}/{self.total}  {text}")


class _Bar(Lines):
    def __init__(self, progress: Any, task: Any) -> None:
        self.progress, self.task = progress, task

    def update(self, done: int, text: str) -> None:
        self.progress.update(self.task, completed=done, text=text)


@contextmanager
def lines(title: str, total: int) -> Iterator[Lines]:
    """A live bar with the time left on a terminal, a plain line now and then elsewhere."""
    global _live
    if _quiet or not sys.stderr.isatty():
        yield _Log(title, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeRemainingColumn(),
    )
    console = Console(file=_Patient(sys.stderr))  # type: ignore[arg-type]
    with Progress(*columns, console=console, redirect_stdout=False) as _live:
        try:
            yield _Bar(_live, _live.add_task(title, total=total, text=""))
        finally:
            _live = None


def track(title: str, items: Iterable[Any], total: int, text: Callable[[Any], str]) -> Iterator[Any]:
    """Yield the items while showing progress; `text(item)` is shown beside the bar."""
    with lines(title, total) as display:
        for done, item in enumerate(items, start=1):
            display.update(done, text(item))
            yield item
