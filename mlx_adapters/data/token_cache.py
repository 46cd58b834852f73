"""Tokens of a large set on disk: written once, read again by every later run on the same rows.

    $MLX_ADAPTERS_CACHE (or mlx-adapters in $XDG_CACHE_HOME or ~/.cache) / tokens / KEY /
        ids.bin            int32, the token ids of all examples, one after the other
        unlabelled.bin     int32, pairs (begin, end) of what is not learned behind the loss start
        lengths.npy        int32 [examples], in tokens
        loss_starts.npy    int32 [examples]
        ranges.npy         int32 [examples], how many pairs each has
        texts.npy          uint64 [rows], by which repeated rows are told
        seen.txt           what the adapter remembers of the rows' questions
        facts.json         what was odd about the rows; size and checksum of each file: written last

KEY is a hash of all that the tokens follow from. A folder without `facts.json`, or with a file that is not
what it says, counts for nothing and is written anew. Its first writer holds a lock on it; the others wait,
and find it done.

Tokens are read from the file when they are asked for, not mapped into memory: pages of a map count as the
process's own once they were touched, and an epoch touches all.
"""

import fcntl
import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from mlx_adapters.cpu.blas import cache
from mlx_adapters.data.picked import Examples
from mlx_adapters.data.tokens import SUMMED, Encoded, Example
from mlx_adapters.errors import OutputError
from mlx_adapters.files.documents import from_json

__all__ = ["FORMAT", "Facts", "StoredExamples", "Writer", "folder_of", "holding", "read"]

FORMAT = 1
"""Another one with every change of what the files hold, or of how rows become tokens."""
_FACTS = "facts.json"
_FILES = (
    *("ids.bin", "unlabelled.bin", "lengths.npy", "loss_starts.npy", "ranges.npy", "texts.npy", "seen.txt"),
)
_BUFFERED = 1 << 18  # numbers that are written together
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Facts:
    """What is known of rows once they were gone through: how many, their `digest`, the hashes of their
    questions, the fields that nothing reads, and how many were left out as excluded."""

    rows: int
    digest: str
    seen: list[str]
    unread: tuple[str, ...] = ()
    left_out: int = 0


class StoredExamples(Examples):
    """The examples in a folder of the cache. `digest` is that of a run over all of them."""

    def __init__(self, folder: Path, bounds: tuple[int, int] | None, digest: str) -> None:
        self.bounds, self.digest = bounds, digest
        self.lengths = np.load(folder / "lengths.npy")
        self._starts = np.load(folder / "loss_starts.npy")
        self._counts = np.load(folder / "ranges.npy")
        self._ends, self._range_ends = np.cumsum(self.lengths, dtype=np.int64), None
        if self._counts.any():
            self._range_ends = np.cumsum(self._counts, dtype=np.int64)
        self._ids, self._ranges = (folder / "ids.bin").open("rb"), (folder / "unlabelled.bin").open("rb")

    def read(self, index: int) -> Example:
        """As of `Examples`."""
        count = int(self.lengths[index])
        ids = _numbers(self._ids.fileno(), int(self._ends[index]) - count, count)
        ranges: tuple[tuple[int, int], ...] = ()
        if self._range_ends is not None and (pairs := int(self._counts[index])):
            first = int(self._range_ends[index]) - pairs
            found = _numbers(self._ranges.fileno(), 2 * first, 2 * pairs)
            ranges = tuple(zip(found[::2], found[1::2], strict=True))
        return Example(ids, int(self._starts[index]), ranges)


class Writer:
    """Takes the examples of `encode` and writes them to a folder; `finish` makes it count."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / _FACTS).unlink(missing_ok=True)
        self._ids = _Numbers(_part(folder, "ids.bin"))
        self._unlabelled = _Numbers(_part(folder, "unlabelled.bin"))
        self._lengths, self._starts, self._ranges = array("i"), array("i"), array("i")
        self._lowest, self._highest = 1 << 31, -1
        self._digest = hashlib.sha256()

    def __len__(self) -> int:
        return len(self._lengths)

    def append(self, example: Example) -> None:
        """Write one more."""
        text = example.as_text()
        self._digest.update((f";{text}" if self._lengths else text).encode())
        self._ids.extend(example.ids)
        self._unlabelled.extend([number for pair in example.unlabelled for number in pair])
        self._lengths.append(len(example.ids))
        self._starts.append(example.loss_start)
        self._ranges.append(len(example.unlabelled))
        self._lowest = min(self._lowest, *example.ids)
        self._highest = max(self._highest, *example.ids)

    def finish(self, encoded: Encoded, facts: Facts) -> None:
        """Write what is known of the rows too, and put all files in place."""
        self._ids.close()
        self._unlabelled.close()
        with _writing(self._folder):
            self._write(encoded, facts)

    def discard(self) -> None:
        """Remove what was written and not put in place."""
        for file in self._folder.glob(f".*.{os.getpid()}"):
            file.unlink(missing_ok=True)

    def _write(self, encoded: Encoded, facts: Facts) -> None:
        folder = self._folder
        named = {"lengths": self._lengths, "loss_starts": self._starts, "ranges": self._ranges}
        for name, numbers in named.items():
            _save(_part(folder, f"{name}.npy"), np.frombuffer(numbers, np.int32))
        _save(_part(folder, "texts.npy"), encoded.texts)
        _part(folder, "seen.txt").write_text("".join(f"{entry}\n" for entry in facts.seen))
        about = {
            "format": FORMAT,
            "bounds": [self._lowest, self._highest],
            "examples_digest": self._digest.hexdigest()[:16],
            "encoded": {name: getattr(encoded, name) for name in _COUNTS},
            "facts": asdict(replace(facts, seen=[])),
            "files": {name: _sum(_part(folder, name)) for name in _FILES},
        }
        _part(folder, _FACTS).write_text(json.dumps(about, indent=1))
        for name in (*_FILES, _FACTS):
            _part(folder, name).replace(folder / name)


_COUNTS = (*SUMMED, "longest", "endless")


def folder_of(key: str) -> Path:
    """Where the tokens of this key are, or will be."""
    return cache() / "tokens" / key


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Name the folder, and the remedy, where it cannot be written."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror or error}), and so many rows keep their tokens "
            "there. Free some space, or let MLX_ADAPTERS_CACHE name another folder"
        ) from None


@contextmanager
def holding(folder: Path, wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Make the folder and keep other processes from writing there; `wait` is called where one does."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: both write the same
            yield
            return
        for left in folder.glob(".*.*"):  # by a process that was killed
            left.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def read(folder: Path) -> tuple[Encoded, Facts] | None:
    """What a folder of the cache holds; None where anything of it is missing or damaged."""
    try:
        about = from_json((folder / _FACTS).read_text())
        if about["format"] != FORMAT:
            return None
        if any(about["files"][name] != _sum(folder / name) for name in _FILES):
            return None
        lowest, highest = about["bounds"]
        examples = StoredExamples(folder, (lowest, highest), about["examples_digest"])
        counts = {name: about["encoded"][name] for name in _COUNTS}
        encoded = Encoded(examples, texts=np.load(folder / "texts.npy"), **counts)
        fields = about["facts"] | {"unread": tuple(about["facts"]["unread"])}
        return encoded, Facts(**fields | {"seen": (folder / "seen.txt").read_text().split()})
    except Exception:  # whatever a file that is missing or damaged raises
        return None


class _Numbers:
    """Integers on their way to a file of int32."""

    def __init__(self, file: Path) -> None:
        self._file, self._stream, self._buffer = file, file.open("wb"), array("i")

    def extend(self, numbers: Sequence[int]) -> None:
        """Write these too, sooner or later."""
        self._buffer.extend(numbers)
        if len(self._buffer) >= _BUFFERED:
            self._flush()

    def close(self) -> None:
        """Write the rest."""
        self._flush()
        self._stream.close()

    def _flush(self) -> None:
        with _writing(self._file.parent):
            self._buffer.tofile(self._stream)
        del self._buffer[:]


def _part(folder: Path, name: str) -> Path:
    """The file while it is written; by process, for where there are no locks."""
    return folder / f".{name}.{os.getpid()}"


def _save(file: Path, numbers: np.ndarray) -> None:
    with file.open("wb") as stream:
        np.save(stream, numbers)


def _sum(file: Path) -> list[int]:
    """[size, CRC-32] of a file."""
    found = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return [file.stat().st_size, found]


def _numbers(handle: int, first: int, count: int) -> list[int]:
    """`count` numbers of a file of int32, from number `first` on."""
    read = os.pread(handle, 4 * count, 4 * first)
    numbers: list[int] = np.frombuffer(read, np.int32, count).tolist()
    return numbers
