"""The test sets: one row each in a table, read from a folder, the hub, or a file of the user's.

Folder layout (LLM-Adapters'): `DATA_DIR/NAME/test.json`, a JSON list of
`{"instruction", "input", "output", "answer"}`.
"""

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_adapters.errors import ConfigError, DataError, unknown
from mlx_adapters.evaluate.answers import Kind

__all__ = ["TASKS", "Hub", "Item", "Task", "find", "load_items", "names"]

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
class Hub:
    """Where a set lives on the hub, and how its rows become instruction and answer."""

    id: str
    config: str | None
    item: Callable[[Mapping[str, Any]], tuple[str, str]]
    split: str = "test"


@dataclass(frozen=True)
class Task:
    """A test set: its name (also its folder's), the kind of its answers, its size in the paper."""

    name: str
    kind: Kind
    items: int
    hub: Hub | None = None


def _gsm8k(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["question"], row["answer"].rsplit("####", 1)[1].strip().replace(",", "")


def _aqua(row: Mapping[str, Any]) -> tuple[str, str]:
    """Options come as "A)21": the prompt has "(A) 21"."""
    options = (option.split(")", 1) for option in row["options"])
    choices = " ".join(f"({letter.strip(' (')}) {text.strip()}" for letter, text in options)
    return f"{row['question']} Answer Choices: {choices}", row["correct"]


def _svamp(row: Mapping[str, Any]) -> tuple[str, str]:
    body = row["Body"].strip()
    return f"{body if body.endswith(('.', '?', '!')) else body + '.'} {row['Question'].strip()}", str(
        row["Answer"]
    )


def _multiarith(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["question"].strip(), str(row["final_ans"])


TASKS: tuple[Task, ...] = (
    Task("gsm8k", "number", 1319, Hub("openai/gsm8k", "main", _gsm8k)),
    Task("AQuA", "letter", 254, Hub("deepmind/aqua_rat", "raw", _aqua)),
    Task("SVAMP", "number", 1000, Hub("ChilleD/SVAMP", None, _svamp)),
    Task("MultiArith", "number", 600, Hub("ChilleD/MultiArith", None, _multiarith)),
    Task("AddSub", "number", 395),
    Task("SingleEq", "number", 508),
    Task("mawps", "number", 238),
    Task(GENERATED, "number", GENERATED_ITEMS),
)


def names() -> list[str]:
    """The known tasks."""
    return [task.name for task in TASKS]


def find(name: str) -> Task:
    """The task of that name, upper or lower case; ConfigError for an unknown one."""
    for task in TASKS:
        if task.name.casefold() == name.strip().casefold():
            return task
    raise ConfigError(unknown("task", name, names()))


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
        rows = json.loads(file.read_text(encoding="utf-8"))
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
    if task.hub is None:
        raise DataError(
            f"{task.name}: not on the hub in this form; get {task.name}/test.json from {_SOURCE}"
            " and give its folder with --data-dir"
        )
    from datasets import load_dataset

    try:
        rows = load_dataset(task.hub.id, task.hub.config, split=task.hub.split)
    except Exception as error:  # the hub client raises many unrelated types for "could not download"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{task.name}: the hub did not give {task.hub.id} ({reason}); "
            f"use --data-dir with {task.name}/test.json"
        ) from None
    return from_rows(task, list(rows))


def from_rows(task: Task, rows: Sequence[Mapping[str, Any]]) -> list[Item]:
    """Items from rows in the schema of the task's hub data set."""
    if task.hub is None:
        raise DataError(f"{task.name}: has no hub data set")
    items = []
    for index, row in enumerate(rows):
        where = f"{task.hub.id}: item {index}"
        try:
            instruction, answer = task.hub.item(row)
        except KeyError as error:
            raise DataError(f"{where}: field {error.args[0]!r} is missing; found {sorted(row)}") from None
        except (IndexError, ValueError, AttributeError) as error:
            raise DataError(f"{where}: not in the expected form ({error})") from None
        items.append(_item({"instruction": instruction, "answer": answer}, task.kind, where))
    return items


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
    return Item(instruction, extra, _label(row["answer"], kind, where))


def _label(answer: Any, kind: Kind, where: str) -> str:
    text = str(answer).strip()
    if kind == "letter":
        if len(text) != 1 or text.upper() not in "ABCDE":
            raise DataError(f"{where}: field 'answer' must be a letter A-E, found {answer!r}")
        return text.upper()
    text = text.replace(",", "")
    try:
        fine = not isinstance(answer, bool) and math.isfinite(float(text))
    except ValueError:
        fine = False
    if not fine:
        raise DataError(f"{where}: field 'answer' must be a number, found {answer!r}")
    return text
