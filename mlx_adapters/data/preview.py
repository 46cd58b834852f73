"""Rows as they will be trained, before they are: their text, what of it is learned, and how long they are."""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from mlx_adapters.data.layouts import column_names
from mlx_adapters.data.sources import Rows, load_rows
from mlx_adapters.data.templates import default_template
from mlx_adapters.data.tokens import Example, encode
from mlx_adapters.models.limits import made_for
from mlx_adapters.models.load import locate, read_config, read_tokenizer

__all__ = ["Shown", "Statistics", "described", "example_pieces", "opened", "shown", "statistics"]

_WHOLE = 1 << 30  # a cutoff that nothing reaches
_CUTOFFS = (256, 512, 1024, 2048, 4096)
_KEPT = 0.99  # the share of rows that the suggested cutoff keeps whole
_ROUND = 64


@dataclass(frozen=True)
class Shown:
    """A row as it is trained. `pieces` are (text, kind) in order; the kind is `context`, `learned` or `cut`
    (behind the cutoff). Special tokens stand in the text as they are. `tokens` counts all, and `supervised`
    those with a label within the cutoff."""

    row: int
    pieces: list[tuple[str, str]]
    tokens: int
    supervised: int


@dataclass(frozen=True)
class Statistics:
    """What `rows` become. Lengths are in tokens.

    Attributes:
        rows: in the source.
        examples: what is trained on; a chat may become several.
        template: the prompt template.
        tokens: of all examples, without a cutoff.
        supervised: those of them with a label.
        lengths: {percentile: length}; `100` is the longest.
        histogram: [(longest, examples up to it and above the one before)].
        cut: {cutoff: share of the examples that are longer}.
        repeated: rows that are the same as an earlier one.
        empty: rows with an empty answer.
        suggested_cutoff: keeps 99 % of the examples whole, within what the model can read.
    """

    rows: int
    examples: int
    template: str
    tokens: int
    supervised: int
    lengths: dict[int, int]
    histogram: list[tuple[int, int]]
    cut: dict[int, float]
    repeated: int
    empty: int
    suggested_cutoff: int


def opened(source: str, model: str | Path, columns: str | None = None) -> tuple[Rows, Any, int | None]:
    """(the rows of `source`, the tokenizer of `model`, the tokens it was made for); no weights are read."""
    folder = locate(model)
    config = read_config(folder)
    rows = load_rows(source, columns=column_names(columns))
    return rows, read_tokenizer(folder, config), made_for(config)


def shown(
    rows: Rows,
    tokenizer: Any,
    *,
    template: str | None = None,
    cutoff: int = 256,
    loss_on: str = "completion",
    count: int = 3,
) -> list[Shown]:
    """The first `count` rows as they are trained. Raises what `encode` raises.

    Args:
        rows: what `load_rows` returns.
        tokenizer: the model's.
        template: by default the one that training would choose.
        cutoff: tokens of the longest row.
        loss_on: as in `encode`.
        count: how many rows.
    """
    template = template or default_template(rows.format, tokenizer)
    found = []
    for index, row in enumerate(rows.rows[:count]):
        one = Rows([row], rows.format, f"{rows.origin} (row {index})")
        for example in encode(one, tokenizer, template=template, cutoff=_WHOLE, loss_on=loss_on).examples:
            pieces = example_pieces(example, tokenizer, cutoff)
            found.append(Shown(index, pieces, len(example.ids), example.cut(cutoff).supervised))
    return found


def example_pieces(example: Example, tokenizer: Any, cutoff: int) -> list[tuple[str, str]]:
    """(text, `context`, `learned` or `cut`) of the parts of an example."""
    kinds = ["context" if index < example.loss_start else "learned" for index in range(len(example.ids))]
    for begin, end in example.unlabelled:
        kinds[begin:end] = ["context"] * (end - begin)
    kinds[cutoff:] = ["cut"] * len(kinds[cutoff:])
    runs = groupby(zip(example.ids, kinds, strict=True), key=lambda pair: pair[1])
    return [(tokenizer.decode([id for id, _ in run]), kind) for kind, run in runs]


def statistics(
    rows: Rows,
    tokenizer: Any,
    *,
    template: str | None = None,
    loss_on: str = "completion",
    longest: int | None = None,
) -> Statistics:
    """Count what the rows become. `longest` is what the model can read, in tokens. Raises as `encode`."""
    template = template or default_template(rows.format, tokenizer)
    done = encode(rows, tokenizer, template=template, cutoff=_WHOLE, loss_on=loss_on)
    lengths = np.array([len(example.ids) for example in done.examples])
    needed = int(np.quantile(lengths, _KEPT, method="higher"))
    suggested = -(-needed // _ROUND) * _ROUND
    return Statistics(
        rows=len(rows.rows),
        examples=len(done.examples),
        template=template,
        tokens=int(lengths.sum()),
        supervised=sum(example.supervised for example in done.examples),
        lengths={p: int(np.percentile(lengths, p, method="higher")) for p in (50, 90, 95, 99, 100)},
        histogram=_histogram(lengths),
        cut={cutoff: round(float((lengths > cutoff).mean()), 4) for cutoff in _CUTOFFS},
        repeated=done.repeated,
        empty=done.empty,
        suggested_cutoff=min(suggested, longest) if longest else suggested,
    )


def _histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """At most twelve bars of equal width, in round numbers of tokens."""
    highest = int(np.max(lengths))
    width = next(
        w for power in range(12) for w in (10**power, 2 * 10**power, 5 * 10**power) if highest <= 12 * w
    )
    edges = range(width, highest + width, width)
    return [(edge, int(np.sum((lengths > edge - width) & (lengths <= edge)))) for edge in edges]


def described(found: Statistics) -> list[str]:
    """The statistics as lines to print: counts, a bar for each range of lengths, the cutoff to choose."""
    share = found.supervised / found.tokens
    counts = (
        f"{found.rows} rows, {found.examples} examples with the template {found.template}; {found.tokens} "
    )
    counts += f"tokens, {share:.0%} supervised; {found.repeated} repeated, {found.empty} with an empty answer"
    most = max(count for _, count in found.histogram)
    wide = len(str(found.histogram[-1][0]))
    bars = [f"{edge:>{wide}} {'█' * round(30 * count / most):30} {count}" for edge, count in found.histogram]
    lengths = ", ".join(f"{length} ({percent} %)" for percent, length in found.lengths.items())
    cut = ", ".join(f"{share:.1%} at {cutoff}" for cutoff, share in found.cut.items())
    return [
        counts,
        f"lengths in tokens: {lengths}",
        *bars,
        f"longer than a cutoff: {cut}",
        f"--cutoff {found.suggested_cutoff} keeps 99 % of the rows whole",
    ]
