"""From rows to the examples of a run: which rows count, how they become text, which are held out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from mlx_adapters.data.large import FileRows
from mlx_adapters.data.layouts import column_names
from mlx_adapters.data.mixture import Weighted, parse_weights, together
from mlx_adapters.data.overlap import item_hash, row_text, rows_texts, seen_hashes
from mlx_adapters.data.picked import Joined, id_rows, pick
from mlx_adapters.data.sources import Rows, digest, load_rows, notes, read_rows, rows_from_list
from mlx_adapters.data.token_cache import Facts
from mlx_adapters.data.tokenized import tokenized_once
from mlx_adapters.data.tokens import SUMMED, Encoded, Example, encode, end_id
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


def rows_of(data: Data, columns: str | None = None, streamed: int | None = None) -> Rows:
    """All rows of `data`, or of each hub dataset the first `streamed`.

    `columns` names the rows' fields, as `prompt=question,completion=answer`. Raises DataError, also where two
    sources have rows that cannot be trained together.
    """
    if isinstance(data, Rows):
        return data
    names = column_names(columns)
    if isinstance(data, str | Path):
        return replace(load_rows(str(data), columns=names, streamed=streamed), sources=(str(data),))
    if all(isinstance(each, dict) for each in data):
        return rows_from_list([each for each in data if isinstance(each, dict)])
    rows = together([load_rows(str(each), columns=names, streamed=streamed) for each in data])
    return replace(rows, sources=tuple(map(str, data)))


def select(rows: Rows, config: TrainConfig, exclude: frozenset[str]) -> tuple[Rows, int]:
    """(the rows to train on, how many were left out): without those whose question's hash is in `exclude`.

    Rows that stay on disk are chosen when they are read; how many were left out is known then.
    """

    if rows.parts:
        return _select_parts(rows, config, exclude)

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


def _select_parts(rows: Rows, config: TrainConfig, exclude: frozenset[str]) -> tuple[Rows, int]:
    """The limit counts the rows of all sources, in their order; a source past it has none."""
    chosen, left_out, limit = [], 0, config.limit
    for part in rows.parts:
        if limit == 0:
            break
        found, count = select(part, replace(config, limit=limit), exclude)
        limit = None if limit is None else max(0, limit - len(found.rows))
        chosen.append(found)
        left_out += count
    return replace(together(chosen), sources=rows.sources), left_out


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
    """The rows as whole examples, in memory or on disk. `written` is the time for templates that write a
    date; of many rows `told` hears how many are done, and how many there are."""
    parts = rows.parts or (rows,)
    found = [_prepared(part, model, config, template, written, told) for part in parts]
    whole = found[0] if len(found) == 1 else _joined(found, rows)
    if config.weights is not None:
        weights = parse_weights(config.weights, len(found))
        sources = np.repeat(np.arange(len(found)), [len(one.encoded.examples) for one in found])
        whole.encoded.examples = mixed = Weighted(whole.encoded.examples, sources, weights)
        mixed.drawn(config.seed, 0)  # a source that gives nothing is told before anything is trained
    check_ids(model.model, id_rows(whole.encoded.examples), model.tokenizer)
    return whole


def _prepared(
    rows: Rows,
    model: LanguageModel,
    config: TrainConfig,
    template: str,
    written: datetime,
    told: Callable[[int, int], None],
) -> Prepared:
    """The examples of one source."""
    options: dict[str, Any] = {"template": template, "loss_on": config.loss_on}
    if isinstance(rows.rows, FileRows):
        found, facts, note = tokenized_once(rows, model.tokenizer, written=written, told=told, **options)
        return Prepared(found, facts, [*notes(replace(rows, unread=facts.unread)), note])
    with written_at(written):
        found = encode(rows, model.tokenizer, **options)
    facts = Facts(len(rows.rows), digest(rows.rows), seen_hashes(rows_texts(rows)), rows.unread)
    return Prepared(found, facts, notes(rows))


def _joined(parts: Sequence[Prepared], rows: Rows) -> Prepared:
    """Several sources as one."""
    encoded, facts = [part.encoded for part in parts], [part.facts for part in parts]
    lists = [one.examples for one in encoded if isinstance(one.examples, list)]
    both = Encoded(
        [example for each in lists for example in each]
        if len(lists) == len(encoded)
        else Joined([one.examples for one in encoded]),
        **{name: sum(getattr(one, name) for one in encoded) for name in SUMMED},
        longest=max(one.longest for one in encoded),
        endless=encoded[0].endless,
        texts=np.concatenate([one.texts for one in encoded]),
    )
    known = Facts(
        sum(one.rows for one in facts),
        digest({"source": one.digest} for one in facts)
        if isinstance(rows.rows, FileRows)
        else digest(rows.rows),
        sorted({entry for one in facts for entry in one.seen}),
        tuple(sorted({name for one in facts for name in one.unread})),
        sum(one.left_out for one in facts),
    )
    return Prepared(both, known, [note for part in parts for note in part.notes])


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
