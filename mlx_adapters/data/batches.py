"""Examples to batches on the device: similar lengths together, nothing dropped, the same order for one seed.

Packed, a row holds several examples one after the other; attention keeps them apart (see train/packing.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_adapters.data.tokens import Example

__all__ = ["MULTIPLE", "Batch", "batches", "groups", "make_batch", "rows_per_pass"]

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


def batches(
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
) -> list[Batch]:
    """All examples once, in batches of `batch_size` rows (the last may be smaller); see `groups`."""
    found = groups(examples, batch_size=batch_size, seed=seed, epoch=epoch, shuffle=shuffle, pack=pack)
    packed = pack is not None
    return [
        make_batch(
            [[examples[i] for i in row] for row in group],
            pad_id=pad_id,
            multiple=multiple,
            packed=packed,
            share=share,
        )
        for group in found
    ]


def groups(
    examples: Sequence[Example],
    *,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    pack: int | None = None,
) -> list[list[list[int]]]:
    """The batches of an epoch as rows of indices, deterministic in (seed, epoch).

    A row is one example; with `pack`, as many as fit into so many tokens.
    """
    rng = np.random.default_rng((seed, epoch))
    order = (rng.permutation(len(examples)) if shuffle else np.arange(len(examples))).tolist()
    rows = _packed(examples, order, pack) if pack else [[i] for i in order]
    window = batch_size * _WINDOW
    found = []
    for first in range(0, len(rows), window):
        chunk = sorted(rows[first : first + window], key=lambda row: sum(len(examples[i].ids) for i in row))
        found += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    return [found[i] for i in rng.permutation(len(found))] if shuffle else found


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


def _packed(examples: Sequence[Example], order: list[int], length: int) -> list[list[int]]:
    """The examples in `order` as rows of at most `length` tokens: each joins the first row with room left.

    Only the last rows are looked at, so that an epoch keeps its order roughly and packing stays linear.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in order:
        size = len(examples[index].ids)
        near = range(max(0, len(rows) - _WINDOW), len(rows))
        place = next((row for row in near if room[row] >= size), None)
        if place is None:
            rows.append([index])
            room.append(length - size)
        else:
            rows[place].append(index)
            room[place] -= size
    return rows


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
