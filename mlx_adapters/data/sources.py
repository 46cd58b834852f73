"""Training data: a file, a folder of files, a dataset of the hub, or a set of the paper by name.

`reading` opens files, `layouts` says which fields rows have. A field from which other trainers learn
something else is refused by `check_fields`; `notes` names the rest.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_adapters.data import wordproblems
from mlx_adapters.data.large import FileRows, Stamp, is_large, is_large_table, stamp_of_file, stamp_of_table
from mlx_adapters.data.layouts import FORMS, as_form, known_fields, layout_of, renamed
from mlx_adapters.data.reading import KINDS, SAVED, Located, is_data, read_rows, without_gaps
from mlx_adapters.errors import DataError, first_line
from mlx_adapters.files.documents import from_json

__all__ = [
    "FORMS",
    "GENERATED",
    "TRAINING_SETS",
    "VALIDATION",
    "Rows",
    "check_fields",
    "digest",
    "line_of",
    "load_rows",
    "notes",
    "part_file",
    "read_rows",
    "rows_from_list",
]

GENERATED = "wordproblems"  # the name of the generated rows

# What is read besides a form's own fields, where a row has it: its type.
_MORE: dict[str, dict[str, type]] = {
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
    "input_ids",
    "label",
    "labels",
    "kto_tag",
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
VALIDATION = ("valid", "validation", "val", "dev")  # what others call the file beside train.jsonl


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
    """The rows of a source in the fields of their form, and where they came from; `unread` are the names of
    fields that nothing reads, `sources` what the user named. Of several sources together, `parts` are those
    of each."""

    rows: Sequence[dict[str, Any]]
    format: str
    origin: str
    unread: tuple[str, ...] = ()
    parts: tuple["Rows", ...] = ()
    sources: tuple[str, ...] = ()


def load_rows(
    source: str,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    streamed: int | None = None,
) -> Rows:
    """Read and check all rows of `source`.

    Args:
        source: a file of one of `KINDS`, also compressed (.gz, .zst); a folder with a file `split` of such a
            kind, or with one data file, or saved by `datasets`; a name of `TRAINING_SETS`, looked for in this
            folder (`FOLDER/NAME`: in that one), then on the hub; `wordproblems`, 2000 generated rows of which
            none is in the test set of that name; or `OWNER/NAME[:CONFIG][/SPLIT][@REVISION]` of the hub.
        split: the part of a folder or hub dataset that names none.
        columns: {a known field: the rows' name for it}.
        streamed: read only so many rows, as they come over the network; for datasets of the hub.

    Raises:
        DataError: names the file and the line or row at fault.
    """
    path = Path(source)
    if streamed is not None and (path.exists() or source in TRAINING_SETS or source == GENERATED):
        raise DataError(f"{source}: is no dataset of the hub, so it is not streamed. Leave out --streaming")
    if source == GENERATED and not path.exists():
        return Rows(wordproblems.generate(2000), "instruction", "generated word problems")
    if path.is_dir():
        if any((path / name).is_file() for name in SAVED):
            return _of_table(_saved(path, split), str(path), columns)
        path = _in_folder(path, split)
    if not path.is_file() and path.name in TRAINING_SETS and path.parent.is_dir():
        return _named(path.name, path.parent, split)
    if path.is_file():
        if path.suffix and not is_data(path):
            raise DataError(
                f"{path}: is not a data file; known are {', '.join(KINDS)}, also .gz and .zst of them"
            )
        return _of_file(path, columns)
    if source.startswith((".", "/", "~")) or "/" not in source or is_data(path):
        kinds, names = ", ".join(KINDS), ", ".join([*TRAINING_SETS, GENERATED])
        raise DataError(
            f"{source}: no such file or folder. Give a file ({kinds}), a folder, a hub id, or one of {names}"
        )
    return _hub_rows(source, split, columns, streamed)


def rows_from_list(rows: list[dict[str, Any]], origin: str = "the given rows") -> Rows:
    """Rows that are in memory, checked as those of a file are."""
    return _checked(lambda: _numbered(rows), origin)


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
    """What is there and not used: fields that nothing reads, a test set beside the training set."""
    found = [f"{rows.origin}: fields that are not used: {', '.join(rows.unread)}"] if rows.unread else []
    file = Path(rows.origin)
    if file.name.partition(".")[0] == "train" and file.is_file():
        tests = (one for one in sorted(file.parent.glob("test.*")) if is_data(one))
        found += [f"{one} is left alone: `eval --task` takes it" for one in tests]
    return found


def digest(rows: Iterable[dict[str, Any]]) -> str:
    """SHA-256 of the rows in their order, whatever file or layout they came in."""
    found = hashlib.sha256()
    for row in rows:
        found.update(line_of(row))
    return found.hexdigest()


def line_of(row: dict[str, Any]) -> bytes:
    """A row as `digest` reads it."""
    return (json.dumps(row, sort_keys=True, default=str) + "\n").encode()


def _named(name: str, folder: Path, split: str) -> Rows:
    files, hub = TRAINING_SETS[name]
    looked = [folder / place / file for place in _PLACES for file in files]
    for file in looked:
        if file.is_file():
            return _of_file(file)
    if hub is None or folder != Path():
        raise DataError(f"{folder / name}: found no {files[0]} in {folder}; get it from {_SOURCE}")
    return _hub_rows(hub, split)


def part_file(folder: Path, part: str) -> Path | None:
    """The file of a data folder that holds a part, such as `train`; None where there is none."""
    files = (folder / f"{part}{kind}{packed}" for kind in KINDS for packed in ("", ".gz", ".zst"))
    return next((file for file in files if file.is_file()), None)


def _in_folder(folder: Path, split: str) -> Path:
    if (file := part_file(folder, split)) is not None:
        return file
    files = sorted(file for file in folder.iterdir() if file.is_file() and is_data(file))
    others = [file for file in files if file.name.partition(".")[0] not in (*VALIDATION, "test")]
    if len(others) != 1:
        found = ", ".join(file.name for file in files) or "none"
        kinds = ", ".join(KINDS)
        raise DataError(f"{folder}: needs a file {split} ({kinds}), or a single data file; found {found}")
    return others[0]


def _of_file(file: Path, columns: Mapping[str, str] | None = None) -> Rows:
    large = (lambda: stamp_of_file(file)) if is_large(file) else None
    return _checked(lambda: read_rows(file), str(file), columns, large)


def _of_table(table: Any, origin: str, columns: Mapping[str, str] | None = None) -> Rows:
    """The rows of a table of `datasets`, which lies on disk as long as they are not all taken."""
    large = (lambda: stamp_of_table(table)) if is_large_table(table) else None
    return _checked(lambda: _numbered(table), origin, columns, large)


def _numbered(rows: Iterable[Any]) -> Iterator[Located]:
    return ((f"row {index}", without_gaps(row)) for index, row in enumerate(rows))


def _saved(folder: Path, split: str) -> Any:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
        return found[split] if isinstance(found, datasets.DatasetDict) else found
    except KeyError:
        raise DataError(f"{folder}: has no split {split!r}, but {', '.join(map(str, found))}") from None
    except Exception as error:  # datasets raises many unrelated types
        raise DataError(f"{folder}: cannot be read as a saved dataset ({first_line(error)})") from None


def _hub_rows(
    source: str, split: str, columns: Mapping[str, str] | None = None, streamed: int | None = None
) -> Rows:
    """Rows of `OWNER/NAME[:CONFIG][/SPLIT][@REVISION]`."""
    rest, _, revision = source.partition("@")
    name, _, config = rest.partition(":")
    if config:
        config, _, part = config.partition("/")
    else:
        owner, _, rest = name.partition("/")
        short, _, part = rest.partition("/")
        name = f"{owner}/{short}"
    which, origin = (name, part or split, config or None, revision or None), f"{name} ({part or split})"
    if streamed is None:
        return _of_table(_from_hub(*which), origin, columns)
    rows = _from_hub(*which, streamed)
    return _checked(lambda: _numbered(rows), f"{origin}, its first {len(rows)} rows", columns)


def _from_hub(
    name: str,
    split: str,
    config: str | None = None,
    revision: str | None = None,
    streamed: int | None = None,
) -> Any:
    try:
        from datasets import load_dataset

        if streamed is not None:
            return list(
                load_dataset(name, config, split=split, revision=revision, streaming=True).take(streamed)
            )
        return load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # datasets raises many unrelated types for "could not get it"
        reason = first_line(error)
        raise DataError(f"{name}: not a file here, and the hub did not give it ({reason})") from None


def _checked(
    rows: Callable[[], Iterable[Located]],
    origin: str,
    columns: Mapping[str, str] | None = None,
    large: Callable[[], Stamp] | None = None,
) -> Rows:
    """The rows, in memory; with `large` they stay where they are, and only the first is looked at."""
    unread: set[str] = set()
    checked = _each(rows(), origin, columns, unread)
    first = next(checked, None)
    if first is None:
        raise DataError(f"{origin}: has no rows")
    row, form = first
    if large is None:
        found = [row, *(row for row, _ in checked)]
        return Rows(found, form, origin, tuple(sorted(unread)))

    def again(unread: set[str]) -> Iterator[dict[str, Any]]:
        return (row for row, _ in _each(rows(), origin, columns, unread))

    key, count = large()
    return Rows(FileRows(again, Stamp(f"{key} {columns}", count)), form, origin)


def _each(
    rows: Iterable[Located], origin: str, columns: Mapping[str, str] | None, unread: set[str]
) -> Iterator[tuple[dict[str, Any], str]]:
    """(a row in the fields of its form, the form) of each, checked; `unread` gets what nothing reads."""
    first: tuple[str, str] | None = None
    for where, row in rows:
        try:
            row = renamed(row, columns)
            layout = layout_of(row)
            unread |= {str(name) for name in row} - known_fields(layout) - {*_CHANGING}
            row, form = as_form(row, layout)
            _check_row(row, form)
        except DataError as error:
            raise DataError(f"{origin}: {where}: {error}") from None
        first = first or (form, where)
        if form != first[0]:
            raise DataError(
                f"{origin}: {where}: is of the form {form}, though {first[1]} is of the form {first[0]}"
            )
        yield row, form


def _check_row(row: dict[str, Any], form: str) -> None:
    if form == "messages":
        if isinstance(row.get("tools"), str):
            try:
                row["tools"] = from_json(row["tools"])
            except ValueError:
                raise DataError("field 'tools' is text that is not JSON") from None
        _check_messages(row)
        return
    for name in {"instruction": ("instruction", "output"), "completion": ("prompt", "completion")}.get(
        form, ("text",)
    ):
        _check_text(row[name], name)
    if form == "instruction":
        _check_text(row.get("input") or "", "input")


def _check_text(value: Any, field: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"field {field!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair; no tokenizer takes it
        raise DataError(f"field {field!r} holds a broken character (a lone surrogate)") from None


def _check_messages(row: dict[str, Any]) -> None:
    """Checks the turns, and writes contents of several texts as one."""
    turns = row["messages"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("field 'messages' must be a list of objects with 'role' and 'content' texts")
    row["messages"] = [_checked_turn(number, turn) for number, turn in enumerate(turns)]


def _checked_turn(number: int, turn: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(turn.get("role"), str):
        raise DataError(f"message {number} has no 'role' text")
    turn = {name: value for name, value in turn.items() if value is not None or name == "content"}
    content = turn.get("content")
    if content is None and (turn.get("tool_calls") or turn.get("reasoning_content")):
        return {**turn, "content": ""}
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise DataError(f"message {number} has content that is not text, which is not learned here")
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise DataError(f"message {number}: field 'content' is {type(content).__name__}, not text")
    _check_text(content, "content")
    return {**turn, "content": content}
