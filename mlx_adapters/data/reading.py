"""Rows of a file, with where each stands: JSON, JSONL, CSV, TSV, Parquet, Arrow or text, also compressed.

JSON and text are read here, exactly as they stand: a CSV's `007` stays three characters. Parquet, Arrow and
folders that `datasets` saved are read by that library.
"""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_adapters.errors import DataError, one_line
from mlx_adapters.files.documents import from_json

__all__ = ["KINDS", "SAVED", "is_data", "read_rows"]

KINDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
"""The kinds of files that are read, in the order of preference in a folder."""
_PACKED = (".gz", ".zst")
SAVED = ("dataset_info.json", "dataset_dict.json")
"""What a folder that `datasets` saved has one of."""
_DELIMITERS = {".csv": ",", ".tsv": "\t"}

Located = tuple[str, Any]


def is_data(path: Path) -> bool:
    """Whether the name of a file is of a kind that is read."""
    return _kind(path) in KINDS


def read_rows(file: Path) -> Iterator[Located]:
    """(where, row) of each row: its line in JSONL, CSV and text, its index elsewhere.

    Raises DataError naming the file, and the line at fault.
    """
    kind = _kind(file)
    if kind in (".parquet", ".arrow"):
        return _table(file, kind)
    text = _text(file)
    if kind in _DELIMITERS:
        return _separated(file, text, _DELIMITERS[kind])
    if kind == ".txt":
        return iter([("the text", {"text": text})])
    return _list(file, text) if text.lstrip().startswith("[") else _objects(file, text)


def _kind(path: Path) -> str:
    """The suffix that says what a file holds, whether it is compressed or not."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _text(file: Path) -> str:
    try:
        return _bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or one_line(error)})") from None


def _bytes(file: Path) -> bytes:
    packed = file.suffix.lower()
    if packed == ".gz":
        with gzip.open(file) as stream:
            return stream.read()
    if packed == ".zst":
        import pyarrow as pa

        with pa.input_stream(str(file), compression="zstd") as stream:
            return bytes(stream.read())
    return file.read_bytes()


def _list(file: Path, text: str) -> Iterator[Located]:
    try:
        rows = from_json(text)
    except ValueError as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise DataError(f"{file}:{line}: is not JSON ({_why(error)}), in a list") from None
    yield from ((f"row {index}", row) for index, row in enumerate(rows))


def _objects(file: Path, text: str) -> Iterator[Located]:
    """One object per line; or one object for the whole file that holds the rows in its field `data`."""
    if len(text) < 1 << 26 and text.lstrip().startswith("{") and '"data"' in text:
        try:
            whole = from_json(text)
        except ValueError:
            whole = None
        if isinstance(whole, dict) and isinstance(whole.get("data"), list):
            yield from ((f"row {index}", row) for index, row in enumerate(whole["data"]))
            return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", from_json(line)
        except ValueError as error:
            why = _why(error)
            raise DataError(f"{file}:{number}: is not JSON ({why}). Each line must be one object") from None


def _why(error: ValueError) -> str:
    """Without json's own line number, which counts within the one line it was given."""
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _separated(file: Path, text: str, delimiter: str) -> Iterator[Located]:
    """The rows below a line of column names; a quoted value may hold line ends."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
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
    import pyarrow.parquet as pq

    try:
        if kind == ".parquet":
            rows = pq.read_table(file).to_pylist()
        else:
            with pa.memory_map(str(file)) as stream:
                try:
                    rows = pa.ipc.open_stream(stream).read_all().to_pylist()
                except pa.ArrowInvalid:
                    rows = pa.ipc.open_file(stream).read_all().to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read as {kind[1:]} ({one_line(error)})") from None
    yield from ((f"row {index}", row) for index, row in enumerate(rows))
