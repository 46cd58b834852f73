"""The test sets: one row each in a table, read from a folder, the hub, or a file of the user's.

Folder layout (LLM-Adapters'): `DATA_DIR/NAME/test.json`, a JSON list of
`{"instruction", "input", "output", "answer"}`.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_adapters.data.sources import read_rows
from mlx_adapters.errors import ConfigError, DataError, first_line, unknown
from mlx_adapters.evaluate.choices import KINDS, WORDS, Kind, as_label
from mlx_adapters.evaluate.hub import HUB, pairs
from mlx_adapters.files.documents import from_json

__all__ = ["GROUPS", "TASKS", "Item", "Task", "find", "from_rows", "load", "load_file", "load_items", "names"]

GENERATED = "wordproblems"
GENERATED_ITEMS = 200  # how many of the endless generated set make "the" test set when no limit is given
_SOURCE = "https://github.com/AGI-Edgerunners/LLM-Adapters, folder dataset/"


@dataclass(frozen=True)
class Item:
    """One question and its right answer."""

    instruction: str
    input: str
    label: str


@dataclass(frozen=True)
class Task:
    """A test set: its name (also its folder's), the kind of its answers, its size in the paper, how long an
    answer may get there. `file` is set for a set of the user's own."""

    name: str
    kind: Kind
    items: int
    max_tokens: int = 256
    file: Path | None = None


TASKS: tuple[Task, ...] = (
    Task("gsm8k", "number", 1319),
    Task("AQuA", "letter", 254),
    Task("SVAMP", "number", 1000),
    Task("MultiArith", "number", 600),
    Task("AddSub", "number", 395),
    Task("SingleEq", "number", 508),
    Task("mawps", "number", 238),
    Task("mathqa", "letter", 2985),
    Task("boolq", "true/false", 3270, 32),
    Task("piqa", "solution", 1838, 32),
    Task("social_i_qa", "answer", 1954, 32),
    Task("hellaswag", "ending", 10042, 32),
    Task("winogrande", "option", 1267, 32),
    Task("ARC-Easy", "answer", 2376, 32),
    Task("ARC-Challenge", "answer", 1172, 32),
    Task("openbookqa", "answer", 500, 32),
    Task(GENERATED, "number", GENERATED_ITEMS),
)

_MATH = ("MultiArith", "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP")
_COMMONSENSE = tuple(task.name for task in TASKS if task.max_tokens == 32)
# The order is that of the paper's tables. MAWPS holds the items of AddSub, MultiArith and SingleEq, and the
# authors took these three back when it turned out that one training set holds MAWPS.
GROUPS: dict[str, tuple[str, ...]] = {
    "math": ("gsm8k", "AQuA", "mawps", "SVAMP"),
    "math-2023": _MATH,
    "commonsense": _COMMONSENSE,
    "all": _MATH + _COMMONSENSE,
}


def names() -> list[str]:
    """The known tasks."""
    return [task.name for task in TASKS]


def find(name: str) -> Task:
    """The task of that name, upper or lower case; ConfigError for an unknown one."""
    for task in TASKS:
        if task.name.casefold() == name.strip().casefold():
            return task
    raise ConfigError(unknown("task", name, [*names(), *GROUPS]))


def load(
    text: str,
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    prompt: str | None = None,
    label: str = "answer",
) -> list[tuple[Task, list[Item]]]:
    """The tasks that `text` names, joined by commas, with their items.

    A name is a task, a group of them, or a .json or .jsonl file of the user's; `prompt` and `label` are for
    such files (see `load_file`). A task named twice is taken once.
    """
    chosen: dict[str, Task | Path] = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name.endswith((".json", ".jsonl")):
            chosen[name] = Path(name)
        else:
            tasks = [find(member) for member in GROUPS.get(name.casefold(), (name,))]
            chosen |= {task.name: task for task in tasks}
    if not chosen:
        raise ConfigError(f"no task named. Known: {', '.join([*names(), *GROUPS])}")
    found = []
    for one in chosen.values():
        if isinstance(one, Task):
            found.append((one, load_items(one, data_dir=data_dir, limit=limit, seed=seed)))
        else:
            task, items = load_file(one, prompt=prompt, label=label)
            found.append((task, _limited(items, limit, seed)))
    return found


def load_items(
    task: Task | str, *, data_dir: Path | None = None, limit: int | None = None, seed: int = 0
) -> list[Item]:
    """The items of a task: generated, from `data_dir`, else from the hub.

    `limit` takes that many at random, the same ones for the same seed, in the set's order.
    Raises DataError naming file, row and field.
    """
    if isinstance(task, str):
        task = find(task)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it must be at least 1")
    if task.name == GENERATED:
        return _generated(task, limit or GENERATED_ITEMS, seed)
    items = _from_hub(task) if data_dir is None else _from_folder(task, Path(data_dir))
    return _limited(items, limit, seed)


def _limited(items: list[Item], limit: int | None, seed: int) -> list[Item]:
    if limit is None or limit >= len(items):
        return items
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), limit))]


def _generated(task: Task, count: int, seed: int) -> list[Item]:
    from mlx_adapters.data import wordproblems

    rows = wordproblems.generate(count, seed=seed, split="test")
    return [_item(row, task.kind, f"{task.name}: item {index}") for index, row in enumerate(rows)]


def _from_folder(task: Task, data_dir: Path) -> list[Item]:
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; --data-dir must hold {task.name}/test.json")
    folders = [path for path in sorted(data_dir.iterdir()) if path.name.casefold() == task.name.casefold()]
    file = (folders[0] if folders else data_dir / task.name) / "test.json"
    try:
        rows = from_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; get it from {_SOURCE}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not valid JSON ({error.msg})") from None
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{file}: must be a JSON list of items with at least one item")
    return [_item(row, task.kind, f"{file}: item {index}") for index, row in enumerate(rows)]


def _from_hub(task: Task) -> list[Item]:
    hub = HUB.get(task.name)
    if hub is None:
        raise DataError(
            f"{task.name}: not on the hub in this form; get {task.name}/test.json from {_SOURCE}"
            " and give its folder with --data-dir"
        )
    from datasets import load_dataset

    try:
        rows = load_dataset(hub.id, hub.config, split=hub.split)
    except Exception as error:  # the hub client raises many unrelated types for "could not download"
        reason = first_line(error)
        raise DataError(
            f"{task.name}: the hub did not give {hub.id} ({reason}); "
            f"use --data-dir with {task.name}/test.json"
        ) from None
    return from_rows(task, list(rows))


def from_rows(task: Task, rows: Sequence[Mapping[str, Any]]) -> list[Item]:
    """Items from rows in the schema of the task's hub data set."""
    hub = HUB.get(task.name)
    if hub is None:
        raise DataError(f"{task.name}: has no hub data set")
    return [_item(row, task.kind, f"{hub.id}: item {index}") for index, row in enumerate(pairs(hub, rows))]


def load_file(file: Path, *, prompt: str | None = None, label: str = "answer") -> tuple[Task, list[Item]]:
    """A test set of the user's own: a .json list or a .jsonl file, with the right answer in field `label`.

    The question is in `instruction` (and `input`), else `question` or `prompt`; or `prompt` is a text that
    names the fields to put in: "{question} Answer Choices: {choices}". The kind of the answers is
    detected from the answers: all numbers, all letters A-E, all true or false, all answer1-5, ...
    """
    rows = list(read_rows(file))
    if not rows:
        raise DataError(f"{file}: has no items")
    items = [_own_row(row, prompt, label, f"{file}: {where}") for where, row in rows]
    answers = [row["answer"] for row in items]
    kind = next((kind for kind in KINDS if all(as_label(a, kind) is not None for a in answers)), None)
    if kind is None:
        odd = next((i for i, a in enumerate(answers) if not any(as_label(a, k) for k in KINDS)), 0)
        raise DataError(
            f"{file}: {rows[odd][0]}: field {label!r}: the answers must be all of one kind: numbers, "
            f"letters A-E, {', '.join(KINDS[2:])}; found {answers[odd]!r}"
        )
    checked = [_item(row, kind, f"{file}: {where}") for (where, _), row in zip(rows, items)]
    longest = 256 if kind in ("number", "letter") else 32
    return Task(file.stem, kind, len(checked), longest, file), checked


def _own_row(row: Any, prompt: str | None, label: str, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be an object, found {type(row).__name__}")
    if label not in row:
        raise DataError(f"{where}: field {label!r} is missing; found {sorted(row)}. Name it with --label")
    if prompt is not None:
        try:
            return {"instruction": prompt.format(**row), "answer": row[label]}
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(
                f"{where}: --prompt cannot be filled ({error}); the row has the fields {sorted(row)}"
            ) from None
    for field in ("instruction", "question", "prompt"):
        if field in row:
            return {"instruction": row[field], "input": row.get("input"), "answer": row[label]}
    raise DataError(
        f"{where}: has no field instruction, question or prompt; found {sorted(row)}. "
        "Say with --prompt how to ask, for example --prompt '{text}'"
    )


def _item(row: Any, kind: Kind, where: str) -> Item:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: must be an object with fields instruction and answer, found {type(row).__name__}"
        )
    instruction, extra = row.get("instruction"), row.get("input") or ""
    if not isinstance(instruction, str) or not instruction.strip():
        raise DataError(f"{where}: field 'instruction' must be text that is not empty, found {instruction!r}")
    if not isinstance(extra, str):
        raise DataError(f"{where}: field 'input' must be text, found {extra!r}")
    if "answer" not in row:
        raise DataError(f"{where}: field 'answer' is missing; found {sorted(row)}")
    label = as_label(row["answer"], kind)
    if label is None:
        wanted = {"number": "a number", "letter": "a letter A-E"}.get(
            kind
        ) or f"one of {'/'.join(WORDS[kind])}"
        raise DataError(f"{where}: field 'answer' must be {wanted}, found {row['answer']!r}")
    return Item(instruction, extra, label)
