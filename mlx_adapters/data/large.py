"""Rows that stay on disk, because all of them together would fill the memory.

A row of a file takes about ten times as many bytes as an object of Python. From 32 MB on, about 50 000 rows
of instructions, the rows of a file are therefore never in memory together: whoever needs them goes through
them, and they are read and checked on the way. That many rows also take ten seconds to tokenize, so their
tokens are kept (`data/token_cache.py`); of less data nothing is written, because nothing is won.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mlx_adapters.data.reading import is_packed, read_rows
from mlx_adapters.errors import DataError, one_line

__all__ = ["FileRows", "Stamp", "is_large", "is_large_table", "stamp_of_file", "stamp_of_table"]

LARGE = 1 << 25  # bytes
_PACKED = 4  # how many bytes one byte of a packed file stands for, roughly
_CHUNK = 1 << 20

Row = dict[str, Any]


class Stamp(NamedTuple):
    """What tells the rows of a source from any others, and how many there are."""

    key: str
    rows: int


class FileRows(Sequence[Row]):
    """Rows that are read and checked each time they are gone through.

    Attributes:
        key: another one where anything about the rows is another.
        unread: the fields that nothing reads, of the rows so far.
        left_out: how many rows were not wanted, so far.
    """

    def __init__(self, read: Callable[[set[str]], Iterator[Row]], stamp: Stamp) -> None:
        self._read, self.key, self._count = read, stamp.key, stamp.rows
        self._keep: Callable[[Row], bool] = lambda row: True
        self._limit: int | None = None
        self.unread: set[str] = set()
        self.left_out = 0

    def __len__(self) -> int:
        """Those that are not wanted are among them: nothing is known of a row before it is read."""
        return self._count if self._limit is None else min(self._count, self._limit)

    def __iter__(self) -> Iterator[Row]:
        self.unread, self.left_out = set(), 0
        return islice(self._wanted(), self._limit)

    def _wanted(self) -> Iterator[Row]:
        for row in self._read(self.unread):
            if self._keep(row):
                yield row
            else:
                self.left_out += 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            places = range(*index.indices(len(self)))
            return list(islice(self, places.start, places.stop, places.step))
        return next(islice(self, index, None))

    def only(self, keep: Callable[[Row], bool] | None, limit: int | None, key: str) -> "FileRows":
        """Those that `keep` wants, at most `limit`; `key` tells what is wanted."""
        found = FileRows(self._read, Stamp(_hashed(self.key, key, repr(limit)), self._count))
        found._keep, found._limit = keep or found._keep, limit
        return found

    def changed(self, change: Callable[[Row], Row], key: str) -> "FileRows":
        """Every row as `change` makes it; `key` names the change."""
        read = self._read
        return FileRows(lambda unread: map(change, read(unread)), Stamp(_hashed(self.key, key), self._count))


def is_large(file: Path) -> bool:
    """Whether the rows of a file stay there."""
    return file.stat().st_size * (_PACKED if is_packed(file) else 1) >= LARGE


def is_large_table(table: Any) -> bool:
    """Whether the rows of a table of `datasets` stay in its files."""
    return bool(getattr(table, "cache_files", None)) and table.data.nbytes >= LARGE


def stamp_of_file(file: Path) -> Stamp:
    """By its whole content: a file that was copied is the same, one that was edited is not, whatever its
    date says. A gigabyte takes a second, and its tokens minutes."""
    found, lines = hashlib.blake2b(digest_size=16), 0
    try:
        with file.open("rb") as stream:
            for line in stream:
                found.update(line)
                lines += not line.isspace()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or one_line(error)})") from None
    count = lines if file.suffix.lower() == ".jsonl" else sum(1 for _ in read_rows(file))
    return Stamp(_hashed(found.hexdigest(), "".join(file.suffixes).lower()), count)


def stamp_of_table(table: Any) -> Stamp:
    """By the content of the files that it lies in, and which rows of them it has."""
    parts = [str(getattr(table, "_fingerprint", "")), str(len(table))]
    for name in dict.fromkeys(each["filename"] for each in table.cache_files):
        with open(name, "rb") as stream:
            found = hashlib.blake2b(digest_size=16)
            while chunk := stream.read(_CHUNK):
                found.update(chunk)
            parts.append(found.hexdigest())
    return Stamp(_hashed(*parts), len(table))


def _hashed(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
