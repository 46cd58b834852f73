"""Rows longer than the max length: what becomes of them.

`cut` keeps the beginning. `left` takes tokens out of the beginning of the prompt, so that the answer stays
whole where it can. `split` makes chunks of rows of text, for continued pre-training: each but the first
repeats the last eighth of the one before as context, so that every token has its label once. `drop` leaves
the row out.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_adapters.data.mixture import Weighted
from mlx_adapters.data.picked import Examples, bounds_of, lengths_of
from mlx_adapters.data.showing import LONG_ROWS
from mlx_adapters.data.tokens import Encoded, Example
from mlx_adapters.errors import ConfigError, DataError

__all__ = ["LONG_ROWS", "Fitted", "check", "fitted", "left_out", "shortened"]

_OVERLAP = 8  # a chunk repeats this part of the one before
_LEAST_CHUNK = 16  # tokens


@dataclass(kw_only=True)
class Fitted(Encoded):
    """Examples of at most `max_length` tokens. `truncated` were longer: they became what `long_rows` says, in
    `chunks` chunks where they were split."""

    max_length: int
    long_rows: str
    chunks: int = 0

    @property
    def in_words(self) -> str:
        """What became of the long rows, behind their number; empty where there is none."""
        what = {
            "cut": f"cut at {self.max_length} tokens",
            "left": f"shortened to {self.max_length} tokens at the prompt's beginning",
            "split": f"split into {self.chunks} chunks of at most {self.max_length} tokens",
            "drop": f"left out: longer than {self.max_length} tokens",
        }
        return what[self.long_rows] if self.truncated else ""


def fitted(
    encoded: Encoded, max_length: int, long_rows: str, *, form: str, origin: str, tokenizer: Any = None
) -> Fitted:
    """The examples with none longer than `max_length` tokens.

    Args:
        encoded: whole examples.
        max_length: tokens of the longest example.
        long_rows: one of `LONG_ROWS`.
        form: of the rows; only `text` is split.
        origin: of the rows, for errors.
        tokenizer: its special tokens at the beginning of an example stay there.

    Raises:
        ConfigError: rows that cannot be split, or not into chunks so short.
        DataError: nothing remains to learn.
    """
    made = Fitted(**vars(encoded), max_length=max_length, long_rows=long_rows)
    if encoded.longest <= max_length:
        return made
    check(long_rows, form, origin)
    special = frozenset(getattr(tokenizer, "all_special_ids", ()))

    def shorten(one: Example) -> list[Example]:
        return [part for part in shortened(one, max_length, long_rows, special) if part.supervised > 0]

    def change(examples: Sequence[Example]) -> tuple[Sequence[Example], np.ndarray]:
        return _changed(made, examples, shorten)

    if isinstance(encoded.examples, Weighted):
        made.examples = encoded.examples.replaced(change)
    else:
        made.examples, _ = change(encoded.examples)
    if not len(made.examples):
        raise DataError(
            f"{origin}: no row has a token to learn within {max_length} tokens. Raise --max-length"
        )
    return made


def check(long_rows: str, form: str, origin: str) -> None:
    """Raise ConfigError where long rows of this form cannot become what `long_rows` says."""
    if long_rows == "split" and form != "text":
        raise ConfigError(
            f"{origin}: rows of the form {form} are not split, since a chunk would answer what it does not "
            "hold. Use --long-rows left, cut or drop, or a larger --max-length"
        )


def _changed(
    made: Fitted, examples: Sequence[Example], shorten: Callable[[Example], list[Example]]
) -> tuple[Sequence[Example], np.ndarray]:
    """(the examples, the long ones as `shorten` makes them, the index of that which each is of); `made` gets
    the counts."""
    lengths = lengths_of(examples)
    counts = np.ones(len(examples), np.int64)
    shorter: dict[int, list[int]] = {}
    for index in np.flatnonzero(lengths > made.max_length).tolist():
        parts = [len(part.ids) for part in shorten(examples[index])]
        shorter[index], counts[index] = parts, len(parts)
    made.truncated = len(shorter)
    made.chunks = sum(map(len, shorter.values()))
    made.dropped += 0 if made.long_rows == "drop" else sum(not parts for parts in shorter.values())
    indices = np.repeat(np.arange(len(examples)), counts)
    view = _Shortened(examples, indices, shorten, shorter)
    return (list(view) if isinstance(examples, list) else view), indices


class _Shortened(Examples):
    """Examples of a sequence on disk, the long ones in parts. Each is of the example with that of `indices`;
    `shorter` has the lengths of the parts of those that are long."""

    def __init__(
        self,
        examples: Sequence[Example],
        indices: np.ndarray,
        shorten: Callable[[Example], list[Example]],
        shorter: Mapping[int, list[int]],
    ) -> None:
        self._examples, self._indices, self._shorten, self._shorter = examples, indices, shorten, shorter
        self._firsts = np.searchsorted(indices, indices)
        self.lengths = lengths_of(examples)[indices]
        for index, parts in shorter.items():
            first = int(np.searchsorted(indices, index))
            self.lengths[first : first + len(parts)] = parts
        self.bounds = bounds_of(examples)

    def read(self, index: int) -> Example:
        """As of `Examples`."""
        number = int(self._indices[index])
        example = self._examples[number]
        if number not in self._shorter:
            return example
        return self._shorten(example)[index - int(self._firsts[index])]


def shortened(
    example: Example, max_length: int, long_rows: str, special: Container[int] = ()
) -> list[Example]:
    """What becomes of an example: itself, unless it is longer than `max_length` tokens. `special` tokens that
    it begins with stay there."""
    if len(example.ids) <= max_length:
        return [example]
    if long_rows == "drop":
        return []
    if long_rows == "split":
        return list(_chunks(example, max_length, _kept(example, special)))
    begin, end = left_out(example, max_length, long_rows, special)[0]
    if end < len(example.ids):
        count = end - begin
        example = replace(
            example,
            ids=[*example.ids[:begin], *example.ids[end:]],
            loss_start=example.loss_start - count,
            unlabelled=tuple((first - count, last - count) for first, last in example.unlabelled),
        )
    return [example.cut(max_length)]


def left_out(
    example: Example, max_length: int, long_rows: str, special: Container[int] = ()
) -> list[tuple[int, int]]:
    """The ranges (begin, end) of an example's tokens that are not trained on; none where it is split."""
    length = len(example.ids)
    if length <= max_length or long_rows == "split":
        return []
    if long_rows == "drop":
        return [(0, length)]
    begin = max(1, _kept(example, special))  # a token stays in front of the first label
    count = min(length - max_length, example.loss_start - begin) if long_rows == "left" else 0
    count = max(0, count)
    front = [(begin, begin + count)] if count else []
    return [*front, *([(max_length + count, length)] if length - count > max_length else [])]


def _kept(example: Example, special: Container[int]) -> int:
    """How many special tokens an example begins with, before its first label."""
    found = next((index for index, id in enumerate(example.ids) if id not in special), 0)
    return min(found, example.loss_start)


def _chunks(example: Example, max_length: int, begin: int) -> Iterator[Example]:
    """The example in pieces that each begin with its first `begin` tokens."""
    overlap = max_length // _OVERLAP
    if max_length < max(_LEAST_CHUNK, 2 * (begin + overlap)):
        raise ConfigError(f"max_length={max_length} is too short for chunks: give at least {_LEAST_CHUNK}")
    yield example.cut(max_length)
    done, context = max_length, begin + overlap
    while done < len(example.ids):
        end = min(done + max_length - context, len(example.ids))
        yield Example([*example.ids[:begin], *example.ids[done - overlap : end]], context)
        done = end
