"""The records of an evaluation on disk: one line per item while it runs, one report at the end.

`FILE.json` is the report. While the evaluation runs its records are in `FILE.partial.jsonl`: first a line
that says what is measured, then one record per line. An interrupted evaluation continues from there; a line
cut short by a crash is dropped.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mlx_adapters.data.overlap import item_hash, row_text
from mlx_adapters.errors import DataError, OutputError, writing_to
from mlx_adapters.evaluate.score import Record
from mlx_adapters.evaluate.tasks import Item
from mlx_adapters.files.documents import from_json
from mlx_adapters.files.lock import hold
from mlx_adapters.files.writing import write_json

__all__ = ["RecordFile", "read_report"]


class RecordFile:
    """The growing records beside the report `output`.

    `settings` is what the answers depend on. Raises OutputError when there are records already and `resume`
    is not set, or when they were made with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any], *, resume: bool) -> None:
        self.output = output
        self.path = output.with_name(output.stem + ".partial.jsonl")
        self._records: dict[str, dict[int, Record]] = {}
        if output.exists():
            raise OutputError(f"{output}: exists. Choose another --output, or remove it")
        if self.path.exists() and not resume:
            raise OutputError(
                f"{self.path}: holds the records of an interrupted evaluation. Go on with --resume, "
                "or remove it"
            )
        with writing_to(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            begun = self.path.exists()
            self._file = self.path.open("a", encoding="utf-8")
            try:
                hold(self._file.fileno(), self.path)
                if begun:
                    self._continue(settings)
                if self._file.tell() == 0:
                    self._write(settings)
            except BaseException:
                self._file.close()
                raise

    def _continue(self, settings: dict[str, Any]) -> None:
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1  # what comes after was cut short by a kill
        whole = content[:end].decode("utf-8", errors="replace").split("\n")[:-1]
        before = _json(whole[0], f"{self.path}:1") if whole else settings
        settings = json.loads(json.dumps(settings))
        if other := sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k)):
            pairs = (f"{key} {before.get(key)!r}, now {settings.get(key)!r}" for key in other)
            raise OutputError(
                f"{self.path}: was made with another {'; '.join(pairs)}. Use the same, or another --output"
            )
        for number, line in enumerate(whole[1:], start=2):
            record = _record(_json(line, f"{self.path}:{number}"), f"{self.path}:{number}")
            self._records.setdefault(record.task, {})[record.index] = record
        self._file.truncate(end)  # only now: the records before it are never written again
        self._file.seek(0, 2)

    def done(self, task: str, items: Sequence[Item]) -> list[Record]:
        """The records there are of a task; DataError when they are of other items than these."""
        records = self._records.get(task, {})
        for index, record in records.items():
            item = items[index] if index < len(items) else None
            row = {"instruction": item.instruction, "input": item.input} if item else {"instruction": ""}
            if item is None or record.item != item_hash(row_text(row, "instruction")):
                raise DataError(
                    f"{self.path}: item {index} of {task} is another question now: the data changed"
                )
        return list(records.values())

    def append(self, record: Record) -> None:
        """Write a record at once."""
        with writing_to(self.path):
            self._write(asdict(record))

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def finish(self, report: dict[str, Any]) -> None:
        """Write the report, whole or not at all, and remove the growing file."""
        self.close()
        write_json(self.output, report)
        with writing_to(self.path):
            self.path.unlink()

    def close(self) -> None:
        """Leave the file as it is, for a later run to continue."""
        self._file.close()

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_report(file: Path) -> tuple[dict[str, Any], list[Record]]:
    """(settings, records) of a report, or of the records of an interrupted evaluation."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; write one with `mlx-adapters eval --output`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from None
    if file.suffix == ".jsonl":
        first, *rest = text.split("\n")[:-1] or [""]
        found = _json(first, f"{file}:1") | {
            "records": [_json(line, f"{file}:{number}") for number, line in enumerate(rest, start=2)]
        }
    else:
        found = _json(text, str(file))
    rows = found.pop("records", None)
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{file}: holds no records; write them with `mlx-adapters eval --output`")
    return found, [_record(row, f"{file}: record {number}") for number, row in enumerate(rows)]


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = from_json(text)
    except ValueError as error:
        raise DataError(f"{where}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: is not a JSON object")
    return value


def _record(row: Any, where: str) -> Record:
    known = {field.name for field in fields(Record)}
    if not isinstance(row, dict) or not {"task", "index", "item", "correct", "label"} <= row.keys() <= known:
        raise DataError(f"{where}: is not a record of `mlx-adapters eval`")
    try:
        return Record(**row)
    except TypeError as error:
        raise DataError(f"{where}: is not a record of `mlx-adapters eval` ({error})") from None
