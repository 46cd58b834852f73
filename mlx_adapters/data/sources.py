"""Training data: a JSON or JSONL file, a folder of them, a dataset of the hub, or a set of the paper by name.

The format is told by the fields of the rows, and every row must have it:

| format | fields |
|---|---|
| instruction | instruction, output (and input) |
| completion | prompt, completion |
| messages | messages: a list of {"role", "content"} (and system, tools, chat_template_kwargs) |
| text | text |

A field from which other trainers learn something else is refused by `check_fields`; `notes` names the rest.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_adapters.data import wordproblems
from mlx_adapters.errors import DataError, first_line
from mlx_adapters.files.documents import from_json

__all__ = [
    "FORMATS",
    "GENERATED",
    "TRAINING_SETS",
    "Rows",
    "check_fields",
    "digest",
    "load_rows",
    "notes",
    "read_rows",
    "rows_from_list",
]

GENERATED = "wordproblems"  # the name of the generated rows

FORMATS: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
# What is read besides, where a row has it: its type.
_MORE: dict[str, dict[str, type]] = {
    "instruction": {"input": str},
    "messages": {"system": str, "tools": list, "chat_template_kwargs": dict},
}
# Fields that change what other trainers learn from a row: where they are not read, a row with one is refused.
_CHANGING = (
    "system",
    "history",
    "tools",
    "functions",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "label",
    "labels",
    "chosen",
    "rejected",
    "rewards",
    "weight",
    "completion_mask",
    "assistant_masks",
    "image",
    "images",
    "video",
    "videos",
    "audio",
    "audios",
)
_NOTHING: tuple[Any, ...] = (None, "", [], {})
_WORDS: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
_VALIDATION = ("valid", "validation", "val", "dev")  # what others call the file beside train.jsonl


# The paper's training sets: (their files in a copy of LLM-Adapters, a hub dataset with the same rows).
TRAINING_SETS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "math_10k": (("math_10k.json",), "lmms-lab/Math10K"),
    "math_7k": (("math_7k.json", "math_7K.json"), None),
    "math_14k": (("math_14k.json",), None),
    "commonsense_15k": (("commonsense_15k.json",), None),
    "commonsense_170k": (("commonsense_170k.json",), "zwhe99/commonsense_170k"),
    "alpaca": (("alpaca_data.json",), "tatsu-lab/alpaca"),
    "alpaca-cleaned": (("alpaca_data_cleaned.json",), "yahma/alpaca-cleaned"),
}
_PLACES = ("", "ft-training_set", "dataset")  # where LLM-Adapters and its heirs keep these files
_SOURCE = "https://github.com/AGI-Edgerunners/LLM-Adapters, folder ft-training_set/"


@dataclass(frozen=True)
class Rows:
    """The rows of a source, their format, and where they came from."""

    rows: list[dict[str, Any]]
    format: str
    origin: str


def load_rows(source: str, *, split: str = "train") -> Rows:
    """Read and check all rows of `source`. DataError names the file and the line or row at fault.

    In a folder, `{split}.jsonl` or `{split}.json` is read, or its only data file. A name of `TRAINING_SETS`
    is looked for in this folder, then on the hub; `FOLDER/NAME` looks for it in that folder. `wordproblems`
    are 2000 generated ones, of which none is in the test set of that name.
    """
    path = Path(source)
    if source == GENERATED and not path.exists():
        return Rows(wordproblems.generate(2000), "instruction", "generated word problems")
    if path.is_dir():
        path = _in_folder(path, split)
    if not path.is_file() and path.name in TRAINING_SETS and path.parent.is_dir():
        return _named(path.name, path.parent, split)
    if path.is_file():
        return _checked(list(read_rows(path)), str(path))
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or path.suffix in (".json", ".jsonl"):
        raise DataError(
            f"{source}: no such file or folder. Give a .json or .jsonl file, a folder, a hub id, or one of "
            f"{', '.join([*TRAINING_SETS, GENERATED])}"
        )
    return _hub_rows(source, split)


def rows_from_list(rows: list[dict[str, Any]], origin: str = "the given rows") -> Rows:
    """Rows that are in memory, checked as those of a file are."""
    return _checked([(f"row {index}", row) for index, row in enumerate(rows)], origin)


def check_fields(row: dict[str, Any], fmt: str) -> None:
    """DataError for a field that would be left out although others learn from it, or of a wrong type."""
    more = _MORE.get(fmt, {})
    for name in _CHANGING:
        value = row.get(name)
        if value in _NOTHING:
            continue
        if name not in more:
            raise DataError(
                f"field {name!r} is not read in rows of the form {fmt}, and without it something else would "
                "be learned: put it into the text, or take it out of the rows"
            )
        if not isinstance(value, more[name]):
            raise DataError(f"field {name!r} is {type(value).__name__}, not {_WORDS[more[name]]}")


def notes(rows: Rows) -> list[str]:
    """What is there and not used: fields that nothing reads, a validation set beside the training set."""
    found = []
    read = {*FORMATS[rows.format], *_MORE.get(rows.format, {})}
    if columns := sorted({str(name) for row in rows.rows for name in row} - read):
        found.append(f"{rows.origin}: fields that are not used: {', '.join(columns)}")
    file = Path(rows.origin)
    beside = [file.with_name(f"{name}{kind}") for name in _VALIDATION for kind in (".jsonl", ".json")]
    if file.stem == "train" and (sets := [one for one in beside if one.is_file()]):
        found.append(f"{sets[0]} is not used: --validation N holds out rows of {file.name}")
    return found


def digest(rows: list[dict[str, Any]]) -> str:
    """SHA-256 of the rows in their order, whatever file or layout they came in."""
    lines = (json.dumps(row, sort_keys=True) + "\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _named(name: str, folder: Path, split: str) -> Rows:
    files, hub = TRAINING_SETS[name]
    looked = [folder / place / file for place in _PLACES for file in files]
    for file in looked:
        if file.is_file():
            return _checked(list(read_rows(file)), str(file))
    if hub is None or folder != Path():
        raise DataError(f"{folder / name}: found no {files[0]} in {folder}; get it from {_SOURCE}")
    return _hub_rows(hub, split)


def _hub_rows(source: str, split: str) -> Rows:
    return rows_from_list(_from_hub(source, split), f"{source} ({split})")


def _in_folder(folder: Path, split: str) -> Path:
    for name in (f"{split}.jsonl", f"{split}.json"):
        if (folder / name).is_file():
            return folder / name
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".jsonl"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise DataError(f"{folder}: needs {split}.json(l), or a single data file; found {found}")
    return files[0]


def read_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row of a JSON list or JSONL file: its line in JSONL, its index in a list."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    if text.lstrip().startswith("["):
        try:
            rows = from_json(text)
        except ValueError as error:
            raise DataError(f"{file}:{_line(error)}: is not JSON ({_why(error)}), in a list") from None
        yield from ((f"row {index}", row) for index, row in enumerate(rows))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", from_json(line)
        except ValueError as error:
            why = _why(error)
            raise DataError(f"{file}:{number}: is not JSON ({why}). Each line must be one object") from None


def _line(error: ValueError) -> int:
    return error.lineno if isinstance(error, json.JSONDecodeError) else 1


def _why(error: ValueError) -> str:
    """Without json's own line number, which counts within the one line it was given."""
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _checked(rows: list[tuple[str, Any]], origin: str) -> Rows:
    if not rows:
        raise DataError(f"{origin}: has no rows")
    fmt = _detect(rows[0][1], rows[0][0], origin)
    for where, row in rows:
        _check_row(row, fmt, f"{origin}: {where}")
    return Rows([row for _, row in rows], fmt, origin)


def _detect(row: Any, where: str, origin: str) -> str:
    if isinstance(row, dict):
        for name, fields in FORMATS.items():
            if all(field in row for field in fields):
                return name
    found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
    forms = "; ".join("+".join(fields) for fields in FORMATS.values())
    raise DataError(f"{origin}: {where}: unknown fields ({found}). Known forms: {forms}")


def _check_row(row: Any, fmt: str, where: str) -> None:
    if not isinstance(row, dict):
        raise DataError(f"{where}: is {type(row).__name__}, not an object")
    for field in FORMATS[fmt]:
        if field not in row:
            raise DataError(f"{where}: field {field!r} is missing, though the first row is of the form {fmt}")
        if fmt == "messages":
            _check_messages(row[field], where)
        else:
            _check_text(row[field], field, where)
    if fmt == "instruction":
        _check_text(row.get("input") or "", "input", where)


def _check_text(value: Any, field: str, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair; no tokenizer takes it
        raise DataError(f"{where}: field {field!r} holds a broken character (a lone surrogate)") from None


def _check_messages(turns: Any, where: str) -> None:
    good = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    )
    if not good or not turns:
        raise DataError(
            f"{where}: field 'messages' must be a list of objects with 'role' and 'content' texts"
        )
    for turn in turns:
        _check_text(turn["content"], "content", where)


def _from_hub(source: str, split: str) -> list[Any]:
    try:
        from datasets import load_dataset

        return list(load_dataset(source, split=split))
    except Exception as error:  # datasets raises many unrelated types for "could not get it"
        reason = first_line(error)
        raise DataError(f"{source}: not a file here, and the hub did not give it ({reason})") from None
