"""Rows of a file, with where each stands: JSON, JSONL, CSV, TSV, Parquet, Arrow or text, also compressed.

JSON and text are read here, exactly as they stand: a CSV's `007` stays three characters. Parquet, Arrow and
folders that `datasets` saved are read by that library. All of them are read as they are asked for, however
long the file is, but for what is one JSON value as a whole.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from mlx_adapters.errors import DataError, one_line
from mlx_adapters.files.documents import from_json

__all__ = ["KINDS", "SAVED", "Located", "is_data", "is_packed", "open_bytes", "read_rows", "without_gaps"]

KINDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
"""The kinds of files that are read, in the order of preference in a folder."""
_PACKED = (".gz", ".zst")
SAVED = ("dataset_info.json", "dataset_dict.json")
"""What a folder that `datasets` saved has one of."""
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_AT_ONCE = 1000  # rows of a table that are made into objects together
_WHOLE = 1 << 26  # bytes of a file that may be one JSON object over many lines

Located = tuple[str, Any]


def is_data(path: Path) -> bool:
    """Whether the name of a file is of a kind that is read."""
    return _kind(path) in KINDS


def is_packed(path: Path) -> bool:
    """Whether the file holds fewer bytes than its rows have: compressed, or Parquet."""
    return path.suffix.lower() in (*_PACKED, ".parquet")


def read_rows(file: Path) -> Iterator[Located]:
    """(where, row) of each row: its line in JSONL, CSV and text, its index elsewhere.

    Raises DataError naming the file, and the line at fault.
    """
    kind = _kind(file)
    if kind in (".parquet", ".arrow"):
        return _table(file, kind)
    if kind in _DELIMITERS:
        return _separated(file, _DELIMITERS[kind])
    if kind == ".txt":
        return iter([("the text", {"text": _text(file)})])
    return _json(file)


def _kind(path: Path) -> str:
    """The suffix that says what a file holds, whether it is compressed or not."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _text(file: Path) -> str:
    return "".join(_lines(file))


def _lines(file: Path, newline: str = "\n") -> Iterator[str]:
    """The lines with their ends, as UTF-8 without a byte order mark. `newline` is as in `open`."""
    try:
        with open_bytes(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline=newline) as text:
            yield from text
    except UnicodeDecodeError:
        raise DataError(f"{file}: is not UTF-8 text (byte {_not_text(file)}): save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise DataError(f"{file}: cannot be read ({reason})") from None


def open_bytes(file: Path) -> BinaryIO:
    """The bytes of a file, unpacked."""
    packed = file.suffix.lower()
    if packed == ".gz":
        return gzip.open(file)  # type: ignore[return-value]
    if packed == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))
    return file.open("rb")


def _not_text(file: Path) -> int:
    """The index of the first byte that is not UTF-8."""
    before = 0
    with open_bytes(file) as stream:
        for line in stream:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return before + error.start
            before += len(line)
    return before


def _json(file: Path) -> Iterator[Located]:
    """A list; one object per line; or one object for the whole file with the rows in its field `data`."""
    lines = ((number, line) for number, line in enumerate(_lines(file), start=1) if line.strip())
    place, line = next(lines, (0, ""))
    if line.lstrip().startswith("["):
        yield from _list(file, _text(file))
        return
    second, whole = next(lines, None), _value(line)
    if whole is None and file.stat().st_size < _WHOLE:  # one object over many lines?
        whole = _value(_text(file))
    elif second is not None:
        whole = None
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        yield from ((f"row {index}", row) for index, row in enumerate(whole["data"]))
        return
    for number, text in chain([(place, line)] if place else [], [second] if second else [], lines):
        try:
            yield f"line {number}", from_json(text.removesuffix("\n"))
        except ValueError as error:
            why = _why(error)
            raise DataError(f"{file}:{number}: is not JSON ({why}). Each line must be one object") from None


def _value(text: str) -> Any:
    """What a JSON text says; None where it is none."""
    try:
        return from_json(text)
    except ValueError:
        return None


def _list(file: Path, text: str) -> Iterator[Located]:
    try:
        rows = from_json(text)
    except ValueError as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise DataError(f"{file}:{line}: is not JSON ({_why(error)}), in a list") from None
    yield from ((f"row {index}", row) for index, row in enumerate(rows))


def _why(error: ValueError) -> str:
    """Without json's own line number, which counts within the one line it was given."""
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _separated(file: Path, delimiter: str) -> Iterator[Located]:
    """The rows below a line of column names; a quoted value may hold line ends."""
    reader = csv.reader(_lines(file, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    try:
        for values in reader:
            if not names:
                names = [name.strip() for name in values]
                if len(set(names)) != len(names) or not all(names):
                    raise DataError(f"{file}:1: the column names {values} must be different and not empty")
            elif len(values) == len(names):
                yield f"line {reader.line_num}", dict(zip(names, values, strict=True))
            elif values:
                raise DataError(
                    f"{file}:{reader.line_num}: has {len(values)} values for {len(names)} columns "
                    f"({', '.join(names)})"
                )
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: is not a table of text ({error})") from None


def _table(file: Path, kind: str) -> Iterator[Located]:
    import pyarrow as pa

    index = 0
    try:
        for batch in _record_batches(file, kind):
            for first in range(0, batch.num_rows, _AT_ONCE):
                for row in batch.slice(first, _AT_ONCE).to_pylist():
                    yield f"row {index}", without_gaps(row)
                    index += 1
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read as {kind[1:]} ({one_line(error)})") from None


def without_gaps(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table, whose objects have every field that an object of any row has: without those that are
    None, which a chat template would write as null."""
    return {name: _without_none(value) for name, value in row.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(part) for name, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value


def _record_batches(file: Path, kind: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == ".parquet":
        with pq.ParquetFile(file) as table:
            yield from table.iter_batches(batch_size=_AT_ONCE)
        return
    with pa.memory_map(str(file)) as stream:
        try:
            yield from pa.ipc.open_stream(stream)
        except pa.ArrowInvalid:
            stream.seek(0)
            table = pa.ipc.open_file(stream)
            yield from (table.get_batch(number) for number in range(table.num_record_batches))
