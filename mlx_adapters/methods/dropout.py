"""Dropout whose masks can be drawn a second time."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

__all__ = ["Dropout", "drawing_from"]


class Dropout(nn.Module):
    """Zeroes a share `p` of its input while training; the rest is scaled by 1 / (1 - p).

    As nn.Dropout, but inside `drawing_from(key)` the mask follows from `key`: a block that is computed a
    second time in the backward pass must draw the same one.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def __call__(self, x: mx.array) -> mx.array:
        if self.p == 0 or not self.training:
            return x
        key = None
        if _keys:
            _keys[-1], key = mx.random.split(_keys[-1])
        return x * mx.random.bernoulli(1 - self.p, x.shape, key=key) * (1 / (1 - self.p))


_keys: list[mx.array] = []


@contextmanager
def drawing_from(key: mx.array) -> Iterator[None]:
    """Let every `Dropout` inside the block draw from `key` instead of MLX's global state."""
    _keys.append(key)
    try:
        yield
    finally:
        _keys.pop()
