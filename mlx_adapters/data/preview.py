"""Rows as they will be trained, before they are: their text, what of it is learned, and how long they are."""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from mlx_adapters.data.layouts import column_names
from mlx_adapters.data.showing import Preview, Shown, Statistics
from mlx_adapters.data.sources import Rows, load_rows
from mlx_adapters.data.templates import asked, default_template
from mlx_adapters.data.tokens import Example, encode
from mlx_adapters.models.limits import made_for
from mlx_adapters.models.load import locate, read_config, read_tokenizer

__all__ = ["described", "example_pieces", "shown", "statistics"]

_WHOLE = 1 << 30  # a cutoff that nothing reaches
_CUTOFFS = (256, 512, 1024, 2048, 4096)
_KEPT = 0.99  # the share of rows that the suggested cutoff keeps whole
_ROUND = 64
_USUAL = Preview()


def shown(source: str | Path | Rows, model: str | Path, settings: Preview = _USUAL) -> list[Shown]:
    """The first rows of `source` as they are trained.

    Args:
        source: training data, as `load_rows` takes it, or rows.
        model: folder or hub id, whose tokenizer and chat template are used; no weights are read.
        settings: how the rows would be trained, and how many to show.

    Raises:
        AdaptersError: the data or the tokenizer cannot be read, or a row does not fit the template.
    """
    rows, tokenizer, _ = _opened(source, model, settings)
    template, tokenizer = _written(rows, tokenizer, settings)
    found = []
    for index, row in enumerate(rows.rows[: settings.rows]):
        one = Rows([row], rows.format, f"{rows.origin} (row {index})")
        done = encode(one, tokenizer, template=template, cutoff=_WHOLE, loss_on=settings.loss_on)
        for example in done.examples:
            pieces = example_pieces(example, tokenizer, settings.cutoff)
            supervised = example.cut(settings.cutoff).supervised
            found.append(Shown(index, pieces, len(example.ids), supervised))
    return found


def _opened(source: str | Path | Rows, model: str | Path, settings: Preview) -> tuple[Rows, Any, int | None]:
    """(the rows of `source`, the tokenizer of `model`, the tokens it was made for)."""
    folder = locate(model)
    config = read_config(folder)
    rows = (
        source if isinstance(source, Rows) else load_rows(str(source), columns=column_names(settings.columns))
    )
    return rows, read_tokenizer(folder, config), made_for(config)


def _written(rows: Rows, tokenizer: Any, settings: Preview) -> tuple[str, Any]:
    """(the template of the rows, the tokenizer that writes them)."""
    usual = default_template(rows.format, tokenizer)
    way = asked(settings.template, settings.chat_template_kwargs, fallback=usual)
    return way.template, way.on(tokenizer)


def example_pieces(example: Example, tokenizer: Any, cutoff: int) -> list[tuple[str, str]]:
    """(text, `context`, `learned` or `cut`) of the parts of an example."""
    kinds = ["context" if index < example.loss_start else "learned" for index in range(len(example.ids))]
    for begin, end in example.unlabelled:
        kinds[begin:end] = ["context"] * (end - begin)
    kinds[cutoff:] = ["cut"] * len(kinds[cutoff:])
    runs = groupby(zip(example.ids, kinds, strict=True), key=lambda pair: pair[1])
    return [(tokenizer.decode([id for id, _ in run]), kind) for kind, run in runs]


def statistics(source: str | Path | Rows, model: str | Path, settings: Preview = _USUAL) -> Statistics:
    """Count what the rows of `source` become; the arguments and errors are those of `shown`."""
    rows, tokenizer, longest = _opened(source, model, settings)
    template, tokenizer = _written(rows, tokenizer, settings)
    done = encode(rows, tokenizer, template=template, cutoff=_WHOLE, loss_on=settings.loss_on)
    lengths = np.array([len(example.ids) for example in done.examples])
    cutoffs = sorted({*_CUTOFFS, settings.cutoff})
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
        cut={cutoff: round(float((lengths > cutoff).mean()), 4) for cutoff in cutoffs},
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
