"""Examples to padded arrays: similar lengths together, nothing dropped, the same order for the same seed.

Packed, a row holds several examples one after the other; attention keeps them apart (see train/packing.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_adapters.data.tokens import Example

__all__ = ["MULTIPLE", "Batch", "batch", "batches", "groups", "pad", "rows_at_once"]

# Tokens of a forward pass on a CPU, of all processes together. Fewer take less memory, but a quantized base
# is written out for every pass, and products of few rows are slower.
_CPU_TOKENS = 640
# Lengths are sorted within a window of this many batches: enough to save the padding, little enough that
# an epoch stays well mixed.
_WINDOW = 32
MULTIPLE = 8  # lengths are rounded up to it: fewer shapes


@dataclass(frozen=True)
class Batch:
    """`ids` int32 [rows, time], right-padded; `mask` float32 of the same shape is 1 at supervised targets.

    `tokens` counts the ids that are not padding, `targets` the supervised ones: where processes share a
    batch, those of all of them. `starts` int32 [rows, time], of a packed batch, is where the example of each
    token begins in its row.
    """

    ids: np.ndarray
    mask: np.ndarray
    tokens: int
    targets: int
    starts: np.ndarray | None = None


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
    """All examples once, in batches of `batch_size` rows (the last may be smaller): see `groups`, `batch`."""
    found = groups(examples, batch_size=batch_size, seed=seed, epoch=epoch, shuffle=shuffle, pack=pack)
    packed = pack is not None
    return [
        batch(examples, group, pad_id=pad_id, multiple=multiple, packed=packed, share=share)
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


def batch(
    examples: Sequence[Example],
    group: Sequence[Sequence[int]],
    *,
    pad_id: int,
    multiple: int = MULTIPLE,
    packed: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Batch:
    """The arrays of one group. The model reads `ids[:, :-1]`; that length is a multiple of `multiple`.

    With `share` (rank, processes) a process gets its rows of it. Their number may be none: then a row
    whose targets count nothing, for all processes have to add up their gradients.
    """
    rank, processes = share
    rows = [[examples[i] for i in row] for row in group]
    own = rows[rank::processes]
    made = _pad(own or rows[:1], pad_id=pad_id, multiple=multiple, packed=packed)
    every = [example for row in rows for example in row]
    return Batch(
        made.ids,
        made.mask if own else np.zeros_like(made.mask),
        sum(len(example.ids) for example in every),
        sum(max(0, len(example.ids) - example.start) for example in every),
        made.starts,
    )


def rows_at_once(rows: int, longest: int, processes: int = 1) -> int:
    """How many rows of a batch are computed together on a CPU; `longest` is in tokens."""
    most = max(1, _CPU_TOKENS // longest)
    parts = math.ceil(rows / math.ceil(rows / most))  # of one size: 4 and 4, not 7 and 1
    return processes * max(1, round(parts / processes))  # and of as many rows for each process


def pad(examples: Sequence[Example], *, pad_id: int, multiple: int = MULTIPLE) -> Batch:
    """One batch of the given examples, one a row."""
    return _pad([[example] for example in examples], pad_id=pad_id, multiple=multiple, packed=False)


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


def _pad(rows: Sequence[Sequence[Example]], *, pad_id: int, multiple: int, packed: bool) -> Batch:
    longest = max(sum(len(example.ids) for example in row) for row in rows)
    length = 1 + -(-(longest - 1) // multiple) * multiple
    ids = np.full((len(rows), length), pad_id, dtype=np.int32)
    mask = np.zeros((len(rows), length), dtype=np.float32)
    starts = np.zeros((len(rows), length), dtype=np.int32)
    for number, row in enumerate(rows):
        begin = 0
        for example in row:
            end = begin + len(example.ids)
            ids[number, begin:end] = example.ids
            mask[number, begin + example.start : end] = 1
            starts[number, begin:end] = begin
            begin = end
        starts[number, begin:] = begin  # the padding is an example of its own
    tokens = sum(len(example.ids) for row in rows for example in row)
    return Batch(ids, mask, tokens, int(mask.sum()), starts if packed else None)
