"""Rows longer than the max length: what becomes of them.

`cut` keeps the beginning. `left` takes tokens out of the beginning of the prompt, so that the answer stays
whole where it can. `split` makes chunks of rows of text, for continued pre-training: each but the first
repeats the last eighth of the one before as context, so that every token has its label once. `drop` leaves
the row out.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_adapters.data.tokens import Encoded, Example
from mlx_adapters.errors import ConfigError, DataError

__all__ = ["LONG_ROWS", "Fitted", "fitted", "left_out", "shortened"]

LONG_ROWS = ("cut", "left", "split", "drop")
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
        """What became of the long rows; empty where there is none."""
        what = {
            "cut": f"cut at {self.max_length} tokens",
            "left": f"cut to {self.max_length} tokens, of the prompt's beginning first",
            "split": f"split into {self.chunks} chunks of at most {self.max_length} tokens",
            "drop": f"left out: longer than {self.max_length} tokens",
        }
        return f"{self.truncated} {what[self.long_rows]}" if self.truncated else ""


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
    if long_rows == "split" and form != "text":
        raise ConfigError(
            f"{origin}: rows of the form {form} are not split, since a chunk would answer what it does not "
            "hold. Use --long-rows left, cut or drop, or a larger --max-length"
        )
    special = frozenset(getattr(tokenizer, "all_special_ids", ()))
    places: list[tuple[int, int]] = []
    for index, example in enumerate(encoded.examples):
        if len(example.ids) <= max_length:
            places.append((index, 0))
            continue
        parts = shortened(example, max_length, long_rows, special)
        learned = [(index, part) for part, one in enumerate(parts) if one.supervised > 0]
        made.truncated += 1
        made.chunks += len(learned)
        made.dropped += not learned and long_rows != "drop"
        places += learned
    view = _Shortened(encoded.examples, places, lambda one: shortened(one, max_length, long_rows, special))
    made.examples = list(view) if isinstance(encoded.examples, list) else view
    if not places:
        raise DataError(
            f"{origin}: no row has a token to learn within {max_length} tokens. Raise --max-length"
        )
    return made


class _Shortened(Sequence[Example]):
    """Examples of a sequence, the long ones in parts; nothing but their `places` is in memory: the index of
    the example and the part."""

    def __init__(
        self,
        examples: Sequence[Example],
        places: Sequence[tuple[int, int]],
        parts: Callable[[Example], list[Example]],
    ) -> None:
        self.examples, self.places, self.parts = examples, np.array(places, np.int64), parts

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        number, part = self.places[index].tolist()
        return self.parts(self.examples[number])[part]


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
