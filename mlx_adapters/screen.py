"""What the user sees: progress on a terminal, plain lines in a log, and tables."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import typer

from mlx_adapters.files.streams import Patient, drop, plain

# A log gets a line at most this often (seconds), besides the first and the last.
_LOG_EVERY = 10.0


_quiet = False
_live: Any = None  # the bar that is on the screen


def be_quiet() -> None:
    """Say nothing from now on: of the processes of a distributed run one speaks."""
    global _quiet
    _quiet = True


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
        drop(sys.stderr)


def table(columns: list[str], rows: list[list[str]], links: Iterable[str] = ()) -> None:
    """A table on stdout, each cell as it is: `[cpu]` is text here, not Rich's markup.

    Columns that are empty are left out, and what stands in the first is never cut. `links` are addresses that
    the cells of the last column lead to on a terminal.
    """
    from rich import box
    from rich.console import Console
    from rich.style import Style
    from rich.table import Table
    from rich.text import Text

    kept = [index for index in range(len(columns)) if not rows or any(row[index] for row in rows)]
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index in kept:
        drawn.add_column(Text(columns[index]), no_wrap=index == 0, overflow="fold")
    for row, link in zip_longest(rows, links):
        cells = [Text(plain(row[index])) for index in kept]
        cells[-1].stylize(Style(link=link))
        drawn.add_row(*cells)
    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.capture() as text:
        console.print(drawn)
    typer.echo(text.get(), nl=False)  # Rich would end the program with 1 where nobody reads it


def picture(rows: Sequence[Any], *, err: bool = False) -> None:
    """Rows as they are trained, in colour or with marks, and what those mean: on stdout, `err` on stderr."""
    from rich.console import Console

    from mlx_adapters.data.showing import in_colour, in_marks

    console = Console(stderr=err, highlight=False)
    with console.capture() as text:
        console.print(in_colour(rows))
    coloured = console.is_terminal and not console.no_color
    typer.echo(text.get() if coloured else plain(in_marks(rows)), nl=False, err=err)


def ended(text: str, following: Iterable[str]) -> None:
    """A result on stdout, and below it what may come next: lines that are ready to be pasted."""
    typer.echo("\n".join([*filter(None, [text]), "Next:", *(f"    {line}" for line in following)]))


@contextmanager
def lines(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Yields `update(done, text)`: a live bar with the time left on a terminal, a plain line now and then
    elsewhere."""
    global _live
    if _quiet or not sys.stderr.isatty():
        yield _log(title, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=Patient(sys.stderr))  # type: ignore[arg-type]
    wide = 24 if console.width >= 100 else 12
    room = console.width - wide - len(title) - 2 * len(str(total)) - 12  # of the counts and the time left
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=wide),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, redirect_stdout=False) as bar:
        task, _live = bar.add_task(title, total=total, text=""), bar
        try:
            yield lambda done, text: bar.update(task, completed=done, text=_fitting(text, room))
        finally:
            _live = None


def _fitting(text: str, room: int) -> str:
    """The first parts of a text, which two spaces divide: as many as there is room for, but one at least."""
    while len(text) > room and "  " in text:
        text = text.rpartition("  ")[0]
    return text


def _log(title: str, total: int) -> Callable[[int, str], None]:
    last, before, ends = 0.0, time.monotonic(), {1, total}

    def update(done: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done in ends or now - (last if done else last or before) >= _LOG_EVERY:
            last = now
            ends.discard(done)
            say(f"{title} {done}/{total}  {text}")

    return update


def track(title: str, items: Iterable[Any], total: int, text: Callable[[Any], str]) -> Iterator[Any]:
    """Yield the items while showing progress; `text(item)` is shown beside the bar."""
    with lines(title, total) as update:
        for done, item in enumerate(items, start=1):
            update(done, text(item))
            yield item
