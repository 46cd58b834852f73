"""Rows as they will be trained, before they are: their text, what of it is learned, and how long they are."""

from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from mlx_adapters.data.layouts import column_names
from mlx_adapters.data.long_rows import Fitted, check, fitted, left_out, shortened
from mlx_adapters.data.showing import Preview, Shown, Statistics
from mlx_adapters.data.sources import Rows, load_rows
from mlx_adapters.data.templates import asked, default_template
from mlx_adapters.data.tokens import Encoded, Example, encode
from mlx_adapters.errors import DataError
from mlx_adapters.fields import parse_fields
from mlx_adapters.models.limits import made_for
from mlx_adapters.models.load import locate, read_config, read_tokenizer

__all__ = ["as_trained", "described", "example_pieces", "row_statistics", "show_rows"]

_LENGTHS = (256, 512, 1024, 2048, 4096)
_KEPT = 0.99  # the share of rows that the suggested max length keeps whole
_ROUND = 64
_WIDTH = 80  # characters of a line
_BAR = 30  # characters of the longest bar


def show_rows(source: str | Path | Rows, model: str | Path, **options: Any) -> list[Shown]:
    """The first rows of training data as they are trained; printing one marks what is learned.

        for row in ma.show_rows("my.jsonl", "my-model", rows=2):
            print(row)

    Args:
        source: Training data, as `train` takes it.
        model: Folder or hub id, whose tokenizer and chat template are used; no weights are read.
        **options: `rows` (how many), and as in training `template`, `loss_on`, `columns`, `max_length` (by
            default the model's), `long_rows`.

    Returns:
        For each of the rows its text in pieces, what is learned and what is cut; a row may make several.

    Raises:
        AdaptersError: The data or the tokenizer cannot be read, or a row does not fit the template.
    """
    settings = parse_fields(Preview, options, where="show_rows")
    rows, tokenizer, longest = _opened(source, model, settings)
    template, tokenizer = _written(rows, tokenizer, settings)
    found = []
    for index, row in enumerate(rows.rows[: settings.rows]):
        one = Rows([row], rows.format, f"{rows.origin} (row {index})")
        done = encode(one, tokenizer, template=template, loss_on=settings.loss_on)
        length = settings.max_length or longest or done.longest
        if done.longest > length:
            check(settings.long_rows, rows.format, one.origin)
        for example in done.examples:
            found += as_trained(index, example, tokenizer, length, settings.long_rows)
    return found


def as_trained(
    row: int, example: Example, tokenizer: Any, max_length: int | None = None, long_rows: str = "cut"
) -> list[Shown]:
    """An example of that row as it is trained, in one piece or in its chunks; without a max length whole."""
    max_length = len(example.ids) if max_length is None else max_length
    special = frozenset(getattr(tokenizer, "all_special_ids", ()))
    trained = shortened(example, max_length, long_rows, special)
    if long_rows == "split":
        return [
            Shown(row, example_pieces(part, tokenizer), len(part.ids), part.supervised) for part in trained
        ]
    gone = left_out(example, max_length, long_rows, special)
    pieces = example_pieces(example, tokenizer, gone)
    return [Shown(row, pieces, len(example.ids), sum(part.supervised for part in trained))]


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


def example_pieces(
    example: Example, tokenizer: Any, left_out: list[tuple[int, int]] | None = None
) -> list[tuple[str, str]]:
    """(text, `context`, `learned` or `cut`) of the parts of an example; `left_out` are the ranges of tokens
    that are cut."""
    kinds = ["context" if index < example.loss_start else "learned" for index in range(len(example.ids))]
    for begin, end in example.unlabelled:
        kinds[begin:end] = ["context"] * (end - begin)
    for begin, end in left_out or []:
        kinds[begin:end] = ["cut"] * (end - begin)
    runs = groupby(zip(example.ids, kinds, strict=True), key=lambda pair: pair[1])
    return [(tokenizer.decode([id for id, _ in run]), kind) for kind, run in runs]


def row_statistics(source: str | Path | Rows, model: str | Path, **options: Any) -> Statistics:
    """Count what training data becomes: rows, tokens, lengths, repeated rows, empty answers.

    Args:
        source: Training data, as `train` takes it.
        model: Folder or hub id, whose tokenizer and chat template are used; no weights are read.
        **options: As in `show_rows`.

    Returns:
        The counts, the lengths in tokens as percentiles and as a histogram, and a max length to choose.

    Raises:
        AdaptersError: The data or the tokenizer cannot be read, or a row does not fit the template.
    """
    settings = parse_fields(Preview, options, where="row_statistics")
    rows, tokenizer, longest = _opened(source, model, settings)
    template, tokenizer = _written(rows, tokenizer, settings)
    done = encode(rows, tokenizer, template=template, loss_on=settings.loss_on)
    lengths = np.array([len(example.ids) for example in done.examples])
    needed = int(np.quantile(lengths, _KEPT, method="higher"))
    suggested = -(-needed // _ROUND) * _ROUND
    length = settings.max_length or min(longest or done.longest, done.longest)
    short = _fitted(rows, done, tokenizer, length, settings.long_rows)
    return Statistics(
        rows=len(rows.rows),
        examples=len(done.examples),
        template=template,
        tokens=int(lengths.sum()),
        supervised=sum(example.supervised for example in done.examples),
        lengths={p: int(np.percentile(lengths, p, method="higher")) for p in (50, 90, 95, 99, 100)},
        histogram=_histogram(lengths),
        cut={one: round(float((lengths > one).mean()), 4) for one in sorted({*_LENGTHS, length})},
        long=int((lengths > length).sum()),
        max_length=length,
        long_rows=short,
        repeated=done.repeated,
        empty=done.empty,
        suggested_max_length=min(suggested, longest) if longest else suggested,
    )


def _fitted(rows: Rows, done: Encoded, tokenizer: Any, max_length: int, long_rows: str) -> str:
    """What becomes of the long rows, in words: also where nothing is left to train on."""
    try:
        found: Fitted = fitted(
            done, max_length, long_rows, form=rows.format, origin=rows.origin, tokenizer=tokenizer
        )
    except DataError:
        return f"no row has a token to learn within {max_length} tokens"
    return f"{found.truncated} {found.in_words}" if found.truncated else ""


def _histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """At most twelve bars of equal width, in round numbers of tokens."""
    highest = int(np.max(lengths))
    width = next(
        w for power in range(12) for w in (10**power, 2 * 10**power, 5 * 10**power) if highest <= 12 * w
    )
    edges = range(width, highest + width, width)
    return [(edge, int(np.sum((lengths > edge - width) & (lengths <= edge)))) for edge in edges]


def described(found: Statistics) -> list[str]:
    """The statistics as lines to print: counts, a bar for each range of lengths, the max length to choose."""
    share = found.supervised / found.tokens
    most = max(count for _, count in found.histogram)
    wide = max(8, len(str(found.histogram[-1][0])))
    bars = [
        f"{edge:>{wide},} {'█' * max(round(_BAR * count / most), count > 0):{_BAR}} {count:,}"
        for edge, count in found.histogram
    ]
    names = {50: "median", 100: "longest"}
    lengths = ", ".join(
        f"{names.get(percent, f'{percent} %')} {length:,}" for percent, length in found.lengths.items()
    )
    longer = [f"{share:.1%} over {length:,}" for length, share in found.cut.items() if share > 0]
    last = wrap(f"longer rows: {', '.join(longer)}", _WIDTH, subsequent_indent="    ") if longer else []
    last += [f"at a max length of {found.max_length:,}: {found.long_rows}"] if found.long_rows else []
    if found.suggested_max_length < found.lengths[100]:
        last.append(f"--max-length {found.suggested_max_length} keeps 99 % of the rows whole")
    else:
        last.append("without --max-length, train keeps all rows whole as far as memory goes")
    return [
        f"{found.rows:,} rows, {found.examples:,} examples with the template {found.template}",
        f"{found.tokens:,} tokens, {share:.0%} supervised",
        f"{found.repeated:,} repeated, {found.empty:,} with an empty answer",
        *wrap(f"lengths: {lengths}", _WIDTH, subsequent_indent="    "),
        "",
        f"{'up to':>{wide}} examples",
        *bars,
        "",
        *last,
    ]
