"""Examples to padded arrays: similar lengths together, nothing dropped, the same order for the same seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_adapters.data.tokens import Example

__all__ = ["Batch", "batches", "pad"]

# Lengths are sorted within a window of this many batches: enough to save the padding, little enough that
# an epoch stays well mixed.
_WINDOW = 32


@dataclass(frozen=True)
class Batch:
    """`ids` int32 [rows, time], right-padded; `mask` float32 of the same shape is 1 at supervised targets.

    `tokens` counts the ids that are not padding, `targets` the supervised ones.
    """

    ids: np.ndarray
    mask: np.ndarray
    tokens: int
    targets: int


def batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    multiple: int = 8,
) -> list[Batch]:
    """All examples once, in batches of `batch_size` (the last may be smaller).

    Deterministic in (seed, epoch). The model reads `ids[:, :-1]`; that length is a multiple of `multiple`.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(examples)) if shuffle else np.arange(len(examples))
    window = batch_size * _WINDOW
    groups = []
    for first in range(0, len(order), window):
        chunk = sorted(order[first : first + window], key=lambda i: len(examples[i].ids))
        groups += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    if shuffle:
        groups = [groups[i] for i in rng.permutation(len(groups))]
    return [pad([examples[i] for i in group], pad_id=pad_id, multiple=multiple) for group in groups]


def pad(examples: Sequence[Example], *, pad_id: int, multiple: int = 8) -> Batch:
    """One batch of the given examples."""
    longest = max(len(example.ids) for example in examples)
    length = 1 + -(-(longest - 1) // multiple) * multiple
    ids = np.full((len(examples), length), pad_id, dtype=np.int32)
    mask = np.zeros((len(examples), length), dtype=np.float32)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        mask[row, example.start : len(example.ids)] = 1
    tokens = sum(len(example.ids) for example in examples)
    return Batch(ids, mask, tokens, int(mask.sum()))
