"""The errors a user can cause. The command line prints one line and exits with code 2 for all of them.

    AdaptersError
    ├── ConfigError       an option, a YAML key or a method's field
    ├── DataError         a data file, a row, a task's test set
    ├── CheckpointError   a model folder, a weight file, a tokenizer, a config.json
    ├── AdapterError      an adapter folder, or an adapter that does not fit its base model
    ├── OutputError       the place to write to: exists, full, read-only
    ├── TrainingError     a run that went wrong: the loss is not a number, a checkpoint does not fit
    └── UnsupportedError  understood, but not possible here; says what is

Every message names the culprit (file, field, line), what was found, and what to do.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

__all__ = [
    "AdapterError",
    "AdaptersError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "OutputError",
    "TrainingError",
    "UnsupportedError",
    "counted",
    "first_line",
    "one_line",
    "reading",
    "unknown",
    "writing_to",
]


class AdaptersError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(AdaptersError):
    """A wrong option, YAML key or method field."""


class DataError(AdaptersError):
    """A data file or a row that cannot be used."""


class CheckpointError(AdaptersError):
    """A model folder or file that cannot be used."""


class AdapterError(AdaptersError):
    """An adapter folder that cannot be used, or does not fit the model."""


class OutputError(AdaptersError):
    """The output cannot be written."""


class TrainingError(AdaptersError):
    """A training run that cannot go on."""


class UnsupportedError(AdaptersError):
    """A request that is understood but cannot be served."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One line for a name that is not in a list: `Unknown method 'lroa'. Did you mean 'lora'? Known: ...`."""
    choices = sorted(known)
    close = get_close_matches(name, choices, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {kind} {name!r}.{hint} Known: {', '.join(choices)}"


def counted(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`: a number with its noun. The plural takes an s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none: some clients explain at length."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """An error's text as one line of at most 400 characters, or its type where it has none."""
    return " ".join(str(error).split())[:400] or type(error).__name__


@contextmanager
def reading(place: Path, kind: type[AdaptersError]) -> Iterator[None]:
    """Re-raise a TypeError, ValueError and the like from the block as `kind`, prefixed with `place`.

    For files with many fields that others wrote: a list where a number should be shows as a TypeError deep
    inside. This package's own errors pass, prefixed with `place` where they do not name it.
    """
    try:
        yield
    except AdaptersError as error:
        if str(place) in str(error):
            raise
        raise type(error)(f"{place}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        message = f"{place}: holds a value that cannot be used ({said}). Was it damaged or edited?"
        raise kind(message) from error


@contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Re-raise what a full or read-only disk causes in the block as an OutputError that names `place`.

    MLX reports a failed write as a RuntimeError without a file name, so only writes belong in the block.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OutputError(
            f"{place}: cannot be written ({reason}). Free some space, or choose another place"
        ) from None
