"""From rows to the examples of a run: which rows count, how they become text, which are held out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from mlx_adapters.data.large import FileRows
from mlx_adapters.data.layouts import column_names
from mlx_adapters.data.overlap import item_hash, row_text, rows_texts, seen_hashes
from mlx_adapters.data.picked import id_rows, pick
from mlx_adapters.data.sources import Rows, digest, load_rows, notes, read_rows, rows_from_list
from mlx_adapters.data.token_cache import Facts
from mlx_adapters.data.tokenized import tokenized_once
from mlx_adapters.data.tokens import Encoded, Example, encode, end_id
from mlx_adapters.errors import DataError, counted
from mlx_adapters.evaluate.tasks import load_file
from mlx_adapters.models.chat_template import written_at
from mlx_adapters.models.limits import check_ids, vocabulary
from mlx_adapters.models.load import LanguageModel
from mlx_adapters.train.config import TrainConfig

__all__ = ["Data", "Prepared", "excluded_hashes", "pad_id", "prepare", "rows_of", "select", "split"]

_FEW = 10_000  # rows of a large set that are taken into memory where no more are wanted

Data = str | Path | Sequence[str | Path] | Sequence[dict[str, Any]] | Rows
"""Training data: a file, folder, hub id or set of the paper; several of them; or the rows themselves."""


def rows_of(data: Data, columns: str | None = None) -> Rows:
    """All rows of `data`. Raises DataError, also where two files have rows of different forms.

    `columns` names the rows' fields, as `prompt=question,completion=answer`.
    """
    if isinstance(data, Rows):
        return data
    names = column_names(columns)
    if isinstance(data, str | Path):
        return replace(load_rows(str(data), columns=names), sources=(str(data),))
    if all(isinstance(each, dict) for each in data):
        return rows_from_list([each for each in data if isinstance(each, dict)])
    parts = [load_rows(str(each), columns=names) for each in data]
    for part in parts[1:]:
        if part.format != parts[0].format:
            raise DataError(
                f"{part.origin}: rows of the form {part.format}, but those of {parts[0].origin} are of the "
                f"form {parts[0].format}. Train on files of one form"
            )
    rows = [row for part in parts for row in part.rows]
    origin = ", ".join(part.origin for part in parts)
    return Rows(rows, parts[0].format, origin, sources=tuple(map(str, data)))


def select(rows: Rows, config: TrainConfig, exclude: frozenset[str]) -> tuple[Rows, int]:
    """(the rows to train on, how many were left out): without those whose question's hash is in `exclude`.

    Rows that stay on disk are chosen when they are read; how many were left out is known then.
    """

    def wanted(row: dict[str, Any]) -> bool:
        return item_hash(row_text(row, rows.format)) not in exclude

    if isinstance(rows.rows, FileRows):
        chosen = rows.rows.only(wanted if exclude else None, config.limit, repr(sorted(exclude)))
        if config.limit is None or config.limit > _FEW:
            return replace(rows, rows=chosen), 0
        kept, excluded = list(chosen), chosen.left_out
        rows = replace(rows, unread=tuple(sorted(chosen.unread)))
    else:
        kept = [row for row in rows.rows if wanted(row)]
        excluded = len(rows.rows) - len(kept)
    kept = kept[: config.limit]
    if not kept:
        raise DataError(
            f"{rows.origin}: all rows ({excluded}) are in the excluded files, nothing is left to train on"
        )
    return replace(rows, rows=kept), excluded


def excluded_hashes(files: Sequence[str | Path]) -> frozenset[str]:
    """Hashes of the questions in test files, of a form of training data or of one that `eval` takes: rows
    that must not be trained on."""
    return frozenset(item_hash(text) for file in files for text in _questions(Path(file)))


def _questions(file: Path) -> list[str]:
    first = next(read_rows(file), ("", None))[1] if file.is_file() else None
    first = first if isinstance(first, dict) else {}
    trained = {"output", "completion", "response", "messages", "conversations", "text"}
    if "answer" not in first or trained & {*first}:
        return rows_texts(load_rows(str(file)))
    _, items = load_file(file)
    return [row_text({"instruction": item.instruction, "input": item.input}, "instruction") for item in items]


@dataclass(frozen=True)
class Prepared:
    """The examples of a run, what is odd about the rows, what is known of them, and what to tell the user."""

    encoded: Encoded
    facts: Facts
    notes: list[str]


def prepare(
    rows: Rows,
    model: LanguageModel,
    config: TrainConfig,
    *,
    template: str,
    written: datetime,
    told: Callable[[int, int], None] = lambda done, rows: None,
) -> Prepared:
    """The rows as examples, in memory or on disk. `written` is the time for templates that write a date; of
    many rows `told` hears how many are done, and how many there are."""
    options: dict[str, Any] = {"template": template, "cutoff": config.cutoff, "loss_on": config.loss_on}
    if isinstance(rows.rows, FileRows):
        found, facts, note = tokenized_once(rows, model.tokenizer, written=written, told=told, **options)
        said = [note]
    else:
        with written_at(written):
            found = encode(rows, model.tokenizer, **options)
        facts = Facts(len(rows.rows), digest(rows.rows), seen_hashes(rows_texts(rows)), rows.unread)
        said = []
    check_ids(model.model, id_rows(found.examples), model.tokenizer)
    return Prepared(found, facts, [*notes(replace(rows, unread=facts.unread)), *said])


def split(examples: Sequence[Example], count: int, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
    """(to train on, `count` held out for validation), drawn by the seed: not neighbours in the file."""
    if count == 0:
        return examples, []
    if count >= len(examples):
        rows = counted(len(examples), "row")
        raise DataError(f"validation={count} leaves nothing of {rows} to train on")
    order = np.random.default_rng(seed).permutation(len(examples))
    return pick(examples, np.sort(order[count:])), pick(examples, order[:count])


def pad_id(model: LanguageModel) -> int:
    """What fills rows up, which no label and no token before it sees: any id that the model has."""
    known = vocabulary(model.model)
    preferred = (model.tokenizer.pad_token_id, end_id(model.tokenizer))
    return next((id for id in preferred if id is not None and (known is None or 0 <= id < known)), 0)
