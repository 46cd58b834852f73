"""Examples to batches on the device: similar lengths together, nothing dropped, the same order for one seed.

Packed, a row holds several examples one after the other; attention keeps them apart (see train/packing.py).
"""

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_adapters.data.picked import Examples, lengths_of
from mlx_adapters.data.tokens import Example

__all__ = ["MULTIPLE", "Batch", "Groups", "batches", "each_batch", "groups", "make_batch", "rows_per_pass"]

# Tokens of a forward pass on a CPU, of all processes together. Fewer take less memory, but a quantized base
# is written out for every pass, and products of few rows are slower.
_CPU_TOKENS = 640
# Lengths are sorted within a window of this many batches: enough to save the padding, little enough that
# an epoch stays well mixed.
_WINDOW = 32
MULTIPLE = 8  # lengths are rounded up to it: fewer shapes
_LABELS = 64  # the number of labels is rounded up to a multiple of it: fewer shapes, fewer allocations


@dataclass(frozen=True)
class Batch:
    """The rows of one forward and backward pass, as arrays on the device.

    The model reads `ids[:, :-1]`; each label is the token that it has to predict at one position there.

    Attributes:
        ids: int32 [rows, time], padded on the right.
        positions: int32 [labels], indices into `ids[:, :-1]`, flattened.
        labels: int32 [labels], the token at each of these positions.
        weights: float32 [labels], how often each counts; 0 for the padding to a round number of labels.
        tokens: how many ids are not padding. Where processes share a batch: in the rows of all of them.
        supervised: how many tokens have a label, counted in the same way.
        example_start: int32 [rows, time - 1] where rows are packed: the index in its row at which the example
            of each token begins.
        host_start: the same on the host, which can then leave out what attention need not compute; a function
            that is compiled does not have it.
        read: float32 [rows, time - 1], for losses on all tokens: 1 for a token, 0 for padding. All tokens of
            the rows are there then.
    """

    ids: mx.array
    positions: mx.array
    labels: mx.array
    weights: mx.array
    tokens: int
    supervised: int
    example_start: mx.array | None = None
    read: mx.array | None = None
    host_start: np.ndarray | None = None

    @classmethod
    def from_mask(
        cls,
        ids: np.ndarray,
        label_mask: np.ndarray,
        *,
        tokens: int,
        supervised: int,
        example_start: np.ndarray | None = None,
        read: np.ndarray | None = None,
    ) -> "Batch":
        """A batch of `ids` [rows, time] whose labels are the tokens with a `label_mask` other than 0."""
        rows, columns = np.nonzero(label_mask)
        count = len(rows)
        padded = max(_LABELS, -(-count // _LABELS) * _LABELS)
        positions, labels = np.zeros(padded, np.int32), np.zeros(padded, np.int32)
        positions[:count] = rows * (ids.shape[1] - 1) + columns - 1
        labels[:count] = ids[rows, columns]
        weights = np.zeros(padded, np.float32)
        weights[:count] = label_mask[rows, columns]
        host = None if example_start is None else example_start[:, :-1]
        starts = None if host is None else mx.array(host)
        arrays = mx.array(ids), mx.array(positions), mx.array(labels), mx.array(weights)
        return cls(
            *arrays, tokens, supervised, starts, None if read is None else mx.array(read[:, :-1]), host
        )

    @property
    def label_mask(self) -> np.ndarray:
        """float32 [rows, time]: how often each token counts as a label."""
        rows, time = self.ids.shape
        mask = np.zeros((rows, time), np.float32)
        counts = np.bincount(np.array(self.positions), np.array(self.weights), rows * (time - 1))
        mask[:, 1:] = counts.reshape(rows, time - 1)
        return mask

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The fields that are arrays, for functions that are compiled."""
        named = {name: getattr(self, name) for name in ("ids", "positions", "labels", "weights")}
        further = {"example_start": self.example_start, "read": self.read}
        return named | {name: array for name, array in further.items() if array is not None}


class Groups(Sequence[list[list[int]]]):
    """The batches of an epoch, each made when it is asked for: rows, each the indices of its examples.

    Row r holds `members[starts[r] : starts[r + 1]]`. Batch b is the part number `sequence[b]` of `rows`, in
    parts of `batch_size`. Four arrays, however many rows there are.
    """

    def __init__(
        self,
        members: np.ndarray,
        starts: np.ndarray,
        rows: np.ndarray,
        sequence: np.ndarray,
        batch_size: int,
    ) -> None:
        self._members, self._starts, self._rows = members, starts, rows
        self._sequence, self._size = sequence, batch_size

    def __len__(self) -> int:
        return len(self._sequence)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        first = int(self._sequence[index]) * self._size
        rows = self._rows[first : first + self._size].tolist()
        return [self._members[self._starts[row] : self._starts[row + 1]].tolist() for row in rows]


def batches(examples: Sequence[Example], **options: Any) -> list[Batch]:
    """The batches of `each_batch`, as a list."""
    return list(each_batch(examples, **options))


def each_batch(
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    multiple: int = MULTIPLE,
    pack: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """All examples once, in batches of `batch_size` rows (the last may be smaller); see `groups`."""
    found = groups(examples, batch_size=batch_size, seed=seed, epoch=epoch, shuffle=shuffle, pack=pack)
    packed = pack is not None
    for group in found:
        rows = [[examples[i] for i in row] for row in group]
        yield make_batch(rows, pad_id=pad_id, multiple=multiple, packed=packed, share=share)


def groups(
    examples: Sequence[Example],
    *,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    pack: int | None = None,
) -> Sequence[list[list[int]]]:
    """The batches of an epoch as rows of indices, deterministic in (seed, epoch).

    A row is one example; with `pack`, as many as fit into so many tokens.
    """
    if not len(examples):
        return []
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(examples)) if shuffle else np.arange(len(examples))
    if shuffle and isinstance(examples, Examples) and (drawn := examples.drawn(seed, epoch)) is not None:
        order = drawn[order]
    lengths = lengths_of(examples)[order]
    members, starts = order, np.arange(len(order) + 1)
    if pack:
        places, starts = _packed(lengths, pack)
        members, lengths = order[places], np.add.reduceat(lengths[places], starts[:-1])
    window = batch_size * _WINDOW
    sorted_rows = np.concatenate(
        [
            first + np.argsort(lengths[first : first + window], kind="stable")
            for first in range(0, len(lengths), window)
        ]
    )
    count = math.ceil(len(sorted_rows) / batch_size)
    sequence = rng.permutation(count) if shuffle else np.arange(count)
    return Groups(members, starts, sorted_rows, sequence, batch_size)


def make_batch(
    rows: Sequence[Sequence[Example]],
    *,
    pad_id: int,
    multiple: int = MULTIPLE,
    packed: bool = False,
    share: tuple[int, int] = (0, 1),
    whole: bool = False,
) -> Batch:
    """The batch of these rows, each the examples that it holds: one, or several where they are `packed`.

    Args:
        rows: of all processes together.
        pad_id: the token that fills rows up.
        multiple: the model reads rows whose length is a multiple of it.
        packed: whether the model has to keep the examples of a row apart.
        share: (rank, number of processes): a process gets its part of the rows. Where no row is left for it,
            one without labels, for all processes have to add up their gradients.
        whole: whether the model reads all tokens, the last one of the longest row too, and `read` says where
            they are.
    """
    rank, processes = share
    own = rows[rank::processes]
    ids, mask, starts, read = _pad(own or rows[:1], pad_id=pad_id, multiple=multiple, more=int(whole))
    every = [example for row in rows for example in row]
    return Batch.from_mask(
        ids,
        mask if own else np.zeros_like(mask),
        tokens=sum(len(example.ids) for example in every),
        supervised=sum(example.supervised for example in every),
        example_start=starts if packed else None,
        read=(read if own else np.zeros_like(read)) if whole else None,
    )


def rows_per_pass(rows: int, longest: int, processes: int = 1) -> int:
    """How many rows of a batch are computed together on a CPU; `longest` is in tokens."""
    fitting = max(1, _CPU_TOKENS // longest)
    passes = math.ceil(rows / math.ceil(rows / fitting))  # of one size: 4 and 4, not 7 and 1
    return processes * max(1, round(passes / processes))  # and of as many rows for each process


def _packed(lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Examples of these `lengths` as rows of at most `length` tokens: each joins the first row with room.

    Only the last rows are looked at, so that an epoch keeps its order roughly and packing stays linear.
    Returns (places in `lengths`, row after row; where each row begins in them, and their number).
    """
    places, starts = array("q"), array("q", [0])
    rows: list[list[int]] = []
    room: list[int] = []

    def close(count: int) -> None:
        for row in rows[:count]:
            places.extend(row)
            starts.append(len(places))
        del rows[:count], room[:count]

    for place, size in enumerate(lengths.tolist()):
        near = next((row for row, left in enumerate(room) if left >= size), None)
        if near is None:
            close(max(0, len(rows) - _WINDOW + 1))
            rows.append([place])
            room.append(length - size)
        else:
            rows[near].append(place)
            room[near] -= size
    close(len(rows))
    return np.frombuffer(places, np.int64), np.frombuffer(starts, np.int64)


def _pad(
    rows: Sequence[Sequence[Example]], *, pad_id: int, multiple: int, more: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(ids, label mask, beginning of each token's example, 1 where ids is no padding), each [rows, time],
    with room for `more` tokens."""
    longest = more + max(sum(len(example.ids) for example in row) for row in rows)
    length = 1 + -(-(longest - 1) // multiple) * multiple
    ids = np.full((len(rows), length), pad_id, dtype=np.int32)
    mask = np.zeros((len(rows), length), dtype=np.float32)
    starts = np.zeros((len(rows), length), dtype=np.int32)
    read = np.zeros((len(rows), length), dtype=np.float32)
    for number, row in enumerate(rows):
        begin = 0
        for example in row:
            end = begin + len(example.ids)
            ids[number, begin:end] = example.ids
            mask[number, begin + example.loss_start : end] = 1
            for first, last in example.unlabelled:
                mask[number, begin + first : begin + last] = 0
            starts[number, begin:end] = begin
            begin = end
        starts[number, begin:] = begin  # the padding is an example of its own
        read[number, :begin] = 1
    return ids, mask, starts, read
