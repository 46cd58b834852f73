"""Validation: which rows the loss is measured on, and the loss on them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_adapters.data.batches import MULTIPLE, each_batch
from mlx_adapters.data.layouts import column_names
from mlx_adapters.data.long_rows import Fitted, fitted
from mlx_adapters.data.overlap import item_hash, rows_texts
from mlx_adapters.data.picked import Joined
from mlx_adapters.data.reading import is_data
from mlx_adapters.data.sources import GENERATED, TRAINING_SETS, VALIDATION, Rows, load_rows, part_file
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import DataError, counted
from mlx_adapters.models.load import LanguageModel
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.distributed import Processes
from mlx_adapters.train.examples import prepare, split
from mlx_adapters.train.loss import loss_sum, split_head

__all__ = ["Parts", "parts_of", "validate"]

_FOUND = 200  # rows of a validation file that nobody named: all of a large one would take long
_HUB = re.compile(r"(?P<name>[^:/@]+/[^:/@]+)(?P<config>:[^/@]+)?(?:/[^@]+)?(?P<revision>@.+)?")


@dataclass(frozen=True)
class Parts:
    """The examples to train on and those to measure the loss on; `words` say where the latter come from, and
    `notes` what a user would not expect of them."""

    training: Sequence[Example]
    validation: Sequence[Example]
    words: str | None = None
    notes: tuple[str, ...] = ()


def parts_of(
    rows: Rows,
    examples: Sequence[Example],
    model: LanguageModel,
    config: TrainConfig,
    *,
    template: str,
    written: datetime,
    seen: Iterable[str] = (),
) -> Parts:
    """Hold rows out, or read others, as `config.validation` says.

    Args:
        rows: the training rows, and where they come from.
        examples: the same, encoded.
        model: whose tokenizer encodes the validation rows, like the training rows.
        template: that of the run.
        written: the time for templates that write a date.
        seen: what `seen_hashes` finds in the training rows.

    Raises:
        DataError: there are no such rows, or none are left to train on.
    """
    wanted = config.validation
    if isinstance(wanted, float):
        wanted = max(1, round(wanted * len(examples)))
    if isinstance(wanted, int):
        training, validation = split(examples, wanted, config.seed)
        text = f"validation on {counted(len(validation), 'row')} of the data, held out by the seed"
        shared = _learned(_both(training, validation), len(validation), "also among the training rows")
        return Parts(training, validation, text if wanted else None, shared)
    found = _found(rows, config) if wanted is None else _named(str(wanted), rows, config)
    if not found:
        return Parts(examples, (), None, tuple(_beside(rows)))
    limit = config.validation_limit or (_FOUND if wanted is None else None)
    trained, others, words, known, total = frozenset(seen), [], [], 0, 0
    for part in found:
        used = _drawn(part, limit, config.seed)
        done = _encoded(used, model, config, template, written)
        others.append(done.examples)
        drawn = f", drawn by the seed from {len(part.rows)}" if len(used.rows) < len(part.rows) else ""
        long = f", {done.truncated} {done.in_words}" if done.in_words else ""
        words.append(f"{counted(len(used.rows), 'row')} of {part.origin}{drawn}{long}")
        known += sum(item_hash(text) in trained for text in rows_texts(used))
        total += len(used.rows)
    validation = others[0] if len(others) == 1 else Joined(others)
    notes = _learned(known, total, "with the question of a training row")
    return Parts(examples, validation, f"validation on {' and '.join(words)}", notes)


def validate(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    processes: Processes | None = None,
    multiple: int = MULTIPLE,
) -> float:
    """Mean loss per supervised token over all `examples`, without dropout."""
    processes = processes or Processes()
    was_training = model.training
    model.eval()
    head = split_head(model)
    total, count = 0.0, 0
    share = (processes.rank, processes.size)
    batch_size *= processes.size
    options: dict[str, Any] = {"pad_id": pad_id, "shuffle": False, "multiple": multiple, "share": share}
    for batch in each_batch(examples, batch_size=batch_size, **options):
        value = loss_sum(model, batch, head=head, gradient=False)
        total += float(processes.sums([value], {})[0][0])
        count += batch.supervised
    model.train(was_training)
    return total / max(1, count)


def _encoded(
    rows: Rows, model: LanguageModel, config: TrainConfig, template: str, written: datetime
) -> Fitted:
    """Rows of a validation file as training encodes its own."""
    one = replace(config, weights=None)  # they are those of the training data
    whole = prepare(rows, model, one, template=template, written=written).encoded
    own = {"form": rows.format, "origin": rows.origin, "tokenizer": model.tokenizer}
    return fitted(whole, config.max_length or whole.longest, config.long_rows, **own)


def _found(rows: Rows, config: TrainConfig) -> list[Rows]:
    """The validation sets of data folders, which nobody has to name."""
    names = column_names(config.columns)
    folders = [Path(source) for source in rows.sources if Path(source).is_dir()]
    found = [(folder, name) for folder in folders if (name := _own(folder)) is not None]
    return [load_rows(str(folder), split=name, columns=names) for folder, name in found]


def _named(wanted: str, rows: Rows, config: TrainConfig) -> list[Rows]:
    """The rows of a file or folder, of a part of the data, or of a dataset of the hub."""
    columns = column_names(config.columns)
    if Path(wanted).exists():
        own = _own(Path(wanted)) if Path(wanted).is_dir() else None
        return [load_rows(wanted, split=own or "train", columns=columns)]
    if not re.fullmatch(r"[\w-]+", wanted):
        return [load_rows(wanted, split="validation", columns=columns)]
    sources = [part for source in rows.sources if (part := _part(source, wanted)) is not None]
    if sources:
        return [load_rows(source, split=wanted, columns=columns) for source in sources]
    if wanted in TRAINING_SETS or wanted == GENERATED:
        return [load_rows(wanted, columns=columns)]
    raise DataError(
        f"validation={wanted}: is no file, and no part of {', '.join(rows.sources) or rows.origin}. Give a "
        "number of rows, a fraction (0.05), a file or folder, or the name of a part"
    )


def _own(folder: Path) -> str | None:
    """The name of the validation set in a data folder."""
    return next((name for name in VALIDATION if _has(folder, name)), None)


def _has(folder: Path, part: str) -> bool:
    """Whether a data folder, or one that `datasets` saved, has a part of that name."""
    if (folder / "dataset_dict.json").is_file():
        return (folder / part).is_dir()
    return part_file(folder, part) is not None


def _part(source: str, part: str) -> str | None:
    """The source that has `part`: a folder, or a dataset of the hub without the part that it was given."""
    path = Path(source)
    if path.exists() or source.startswith((".", "/", "~")) or is_data(path):
        return source if path.is_dir() and _has(path, part) else None
    found = _HUB.fullmatch(source)
    return f"{found['name']}{found['config'] or ''}{found['revision'] or ''}" if found else None


def _beside(rows: Rows) -> list[str]:
    """A note where a validation set lies beside a training file, and nothing is measured on it."""
    files = [Path(source) for source in rows.sources or (rows.origin,)]
    files = [file for file in files if file.name.partition(".")[0] == "train" and file.is_file()]
    sets = [part_file(file.parent, name) for file in files if (name := _own(file.parent)) is not None]
    return [f"{one} is not used: --validation {one} measures on it" for one in sets]


def _drawn(rows: Rows, limit: int | None, seed: int) -> Rows:
    if limit is None or limit >= len(rows.rows):
        return rows
    chosen = {*np.random.default_rng(seed).permutation(len(rows.rows))[:limit].tolist()}
    return replace(rows, rows=[row for index, row in enumerate(rows.rows) if index in chosen])


def _both(training: Sequence[Example], validation: Sequence[Example]) -> int:
    """How many validation examples are training examples too; not looked for where they lie on disk."""
    if not isinstance(training, list):
        return 0
    measured = {tuple(example.ids) for example in validation}
    trained = {ids for example in training if (ids := tuple(example.ids)) in measured}
    return sum(tuple(example.ids) in trained for example in validation)


def _learned(known: int, total: int, how: str) -> tuple[str, ...]:
    note = f"validation rows {how}: {known} of {total}. On these the loss tells what was learned by heart"
    return (note,) if known else ()
