"""What a run asks of its examples, whether they are a list or lie on disk: their lengths, some of them, ids.

Examples are a list where they are few. Millions are a sequence that reads each when it is asked for
(`data/token_cache.py`); such a sequence knows its `lengths` and `bounds` and can `pick` some of it, so that
nothing goes through all of it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from mlx_adapters.data.tokens import Example

__all__ = ["Examples", "Joined", "Picked", "bounds_of", "id_rows", "lengths_of", "pick"]


class Examples(Sequence[Example]):
    """Examples that are not in a list: a subclass sets `lengths` and `bounds` and says how one is `read`.

    Attributes:
        lengths: int32 [examples], in tokens.
        bounds: the lowest and the highest token id; None where there is no example.
    """

    lengths: np.ndarray
    bounds: tuple[int, int] | None

    def read(self, index: int) -> Example:
        """The example number `index`, from 0 on."""
        raise NotImplementedError

    def pick(self, indices: np.ndarray) -> "Examples":
        """Those of these indices, in this order."""
        return Picked(self, indices)

    def drawn(self, seed: int, epoch: int) -> np.ndarray | None:
        """Which examples an epoch has; None for all of them once."""
        return None

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.pick(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.read(index % len(self))

    def __iter__(self) -> Iterator[Example]:
        return map(self.read, range(len(self)))


class Picked(Examples):
    """Some of `examples`, in the order of their `indices`."""

    def __init__(self, examples: Examples, indices: np.ndarray) -> None:
        self._examples, self._indices = examples, indices
        self.lengths, self.bounds = examples.lengths[indices], examples.bounds

    def read(self, index: int) -> Example:
        """As of `Examples`."""
        return self._examples.read(int(self._indices[index]))


class Joined(Examples):
    """The examples of several sources, one source after the other."""

    def __init__(self, parts: Sequence[Sequence[Example]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.lengths = np.concatenate([lengths_of(part) for part in parts])
        self.bounds = bounds_of(*parts)

    def read(self, index: int) -> Example:
        """As of `Examples`."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][index - int(self._ends[part - 1] if part else 0)]


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """int32 [examples]: how many tokens each has."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.fromiter((len(example.ids) for example in examples), np.int32, len(examples))


def id_rows(examples: Sequence[Example]) -> Iterable[Sequence[int]]:
    """Token ids among which are the lowest and the highest of all: of each example, or these two only."""
    if isinstance(examples, Examples):
        return [examples.bounds] if examples.bounds else []
    return (example.ids for example in examples)


def bounds_of(*parts: Sequence[Example]) -> tuple[int, int] | None:
    """The lowest and the highest token id of all parts; None where there is no token."""
    ids = [id for part in parts for row in id_rows(part) if row for id in (min(row), max(row))]
    return (min(ids), max(ids)) if ids else None


def pick(examples: Sequence[Example], indices: np.ndarray) -> Sequence[Example]:
    """The examples of these indices: a list of a list, a `Picked` of what lies on disk."""
    if isinstance(examples, Examples):
        return examples.pick(indices)
    return [examples[index] for index in indices]
