"""Positions of tokens for models that look them up in a table."""

from typing import Any

import mlx.core as mx

__all__ = ["positions"]


def positions(inputs: mx.array, cache: Any) -> mx.array:
    """The position of each of `inputs` [rows, time]: [time], or [rows, time] where a batch is padded.

    A padded batch has an offset per row, negative while the padding is read: such places are masked, and
    need only be valid numbers.
    """
    offset = 0 if cache is None else cache.offset
    if isinstance(offset, mx.array):
        offset = offset[:, None] if offset.ndim else offset
    return mx.maximum(mx.arange(inputs.shape[1]) + offset, 0)
