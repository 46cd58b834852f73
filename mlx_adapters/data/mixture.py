"""Several sources in one run: one after the other, or drawn by weight.

With weights an epoch has as many rows as all sources together, of which each source gives its share: a weight
says how much of what is learned comes from a source, however many rows it has. The rows of a source come in
turn, in an order of their own that is drawn anew when all were there. So a large source with a small weight
is learned over several epochs, and a small one with a large weight is repeated within one. What is drawn
follows from the seed and the epoch alone, which is why a run can be resumed.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from mlx_adapters.data.large import FileRows, Stamp
from mlx_adapters.data.picked import Examples, bounds_of, lengths_of, pick
from mlx_adapters.data.sources import Rows
from mlx_adapters.data.templates import messages_of
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import ConfigError, DataError, counted

__all__ = ["Weighted", "parse_weights", "shares", "together"]


def together(parts: Sequence[Rows]) -> Rows:
    """The rows of several sources; `parts` has them in their own forms, which may differ.

    Together they are conversations then, which is what a chat template makes of each. Raises DataError where
    that cannot be: rows of text are no conversations.
    """
    if len(parts) == 1:
        return parts[0]
    same = parts
    if len({part.format for part in parts}) > 1:
        if text := next((part for part in parts if part.format == "text"), None):
            other = next(part for part in parts if part.format != "text")
            raise DataError(
                f"{text.origin}: rows of text, which are learned whole, but those of {other.origin} are of "
                f"the form {other.format}. Train on them one after the other, or give them one form"
            )
        same = [_as_messages(part) for part in parts]
    origin = ", ".join(part.origin for part in parts)
    rows: Sequence[dict[str, Any]]
    if any(isinstance(part.rows, FileRows) for part in same):
        stamp = Stamp(" ".join(part.origin for part in same), sum(len(part.rows) for part in same))
        rows = FileRows(lambda unread: chain.from_iterable(part.rows for part in same), stamp)
    else:
        rows = [row for part in same for row in part.rows]
    return Rows(rows, same[0].format, origin, parts=tuple(parts))


def _as_messages(part: Rows) -> Rows:
    if part.format == "messages":
        return part
    own = {"instruction", "input", "output"} if part.format == "instruction" else {"prompt", "completion"}

    def change(row: dict[str, Any]) -> dict[str, Any]:
        messages, _ = messages_of(row, part.format)
        return {"messages": messages, **{name: value for name, value in row.items() if name not in own}}

    if isinstance(part.rows, FileRows):
        return Rows(part.rows.changed(change, "messages"), "messages", part.origin)
    return Rows([change(row) for row in part.rows], "messages", part.origin, part.unread)


def parse_weights(text: str, sources: int) -> list[float]:
    """The weights of so many sources, as `3,1`; ConfigError for another form, or number, of them."""
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if not weights or not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"weights {text!r}: write a positive number for each source, as 3,1")
    if len(weights) != sources:
        raise ConfigError(
            f"weights {text!r}: {counted(len(weights), 'number')} for {counted(sources, 'source')}. "
            "Give --data once for each source, and a weight for each"
        )
    return weights


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided by weight, in whole numbers of this sum: the largest remainders are rounded up."""
    exact = np.array(weights) / sum(weights) * total
    found = np.floor(exact).astype(int)
    order = np.argsort(found - exact, kind="stable")
    found[order[: total - int(found.sum())]] += 1
    return [int(share) for share in found]


class Weighted(Examples):
    """Examples of which an epoch draws by weight. `sources` [examples] says from which source each is."""

    def __init__(self, examples: Sequence[Example], sources: np.ndarray, weights: Sequence[float]) -> None:
        self._examples, self._sources, self._weights = examples, sources, weights
        self.lengths = lengths_of(examples)
        self.bounds = bounds_of(examples)

    def read(self, index: int) -> Example:
        """As of `Examples`."""
        return self._examples[index]

    def pick(self, indices: np.ndarray) -> "Weighted":
        """Those of these indices."""
        return Weighted(pick(self._examples, indices), self._sources[indices], self._weights)

    def replaced(
        self, change: Callable[[Sequence[Example]], tuple[Sequence[Example], np.ndarray]]
    ) -> "Weighted":
        """With examples that `change` makes of these: (examples, the indices of those they are made of)."""
        made, indices = change(self._examples)
        return Weighted(made, self._sources[indices], self._weights)

    @property
    def described(self) -> str:
        """What a resumed run must share: `3:1 of 100+50 rows`."""
        sizes = np.bincount(self._sources, minlength=len(self._weights))
        return f"{':'.join(f'{w:g}' for w in self._weights)} of {'+'.join(map(str, sizes))} rows"

    def drawn(self, seed: int, epoch: int) -> np.ndarray:
        """The indices of an epoch's examples, source by source. DataError for a source that gives none."""
        found = []
        for source, share in enumerate(shares(len(self), self._weights)):
            members = np.flatnonzero(self._sources == source)
            if not len(members) or not share:
                raise DataError(
                    f"weights {self.described}: the source number {source + 1} gives no row to an epoch of "
                    f"{len(self)}. Raise its weight, or leave it out"
                )
            places = np.arange(epoch * share, (epoch + 1) * share)
            passes, within = places // len(members), places % len(members)
            for number in np.unique(passes):
                order = np.random.default_rng((seed, source, int(number), 1)).permutation(members)
                found.append(order[within[passes == number]])
        return np.concatenate(found)
