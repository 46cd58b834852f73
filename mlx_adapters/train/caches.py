"""Caches for training: models of mlx-lm take earlier keys and values from their cache, and their mask too."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from mlx_adapters.models.masks import Mask

__all__ = ["ExampleCache", "KeysValues", "PrefixCache", "keys_and_values", "prefix_cache"]

KeysValues = list[tuple[mx.array, mx.array]]
"""Keys and values of each layer, [1, heads, tokens, width]."""


class PrefixCache(KVCache):
    """Keys and values that precede each row. One that `grows` appends the row's own."""

    def __init__(self, keys: mx.array | None = None, values: mx.array | None = None, *, grows: bool) -> None:
        super().__init__()
        self.keys, self.values, self.grows = keys, values, grows
        self.offset = 0 if keys is None else keys.shape[2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is not None and self.values is not None:
            keys, values = _append(self.keys, keys), _append(self.values, values)
        if self.grows:
            self.keys, self.values, self.offset = keys, values, keys.shape[2]
        return keys, values

    def state_mask(self, time: int, window_size: int | None) -> Mask:
        """What each of `time` tokens after these keys sees."""
        return Mask(time, self.offset + time, window_size)


class ExampleCache:
    """Remembers nothing, and lets a token of a packed row see only the earlier ones of its own example.

    `example_start` says where that begins, [rows, time]; `host_start` the same, where the host knows it.
    """

    offset = 0
    keys = values = None

    def __init__(self, example_start: mx.array, host_start: np.ndarray | None = None) -> None:
        self.example_start, self.host_start = example_start, host_start

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def state_mask(self, time: int, window_size: int | None) -> Mask:
        """What each token sees: its own example's tokens up to itself, within the window."""
        return Mask(time, time, window_size, self.example_start, self.host_start)

    def make_mask(
        self, time: int, return_array: bool = False, window_size: int | None = None, **_: Any
    ) -> mx.array:
        """The same as an array: boolean [rows, 1, time, time]."""
        return self.state_mask(time, window_size).array


def prefix_cache(prefix: KeysValues) -> list[PrefixCache]:
    """A cache for each layer, for rows that `prefix` precedes."""
    return [PrefixCache(keys, values, grows=False) for keys, values in prefix]


def keys_and_values(caches: Sequence[PrefixCache]) -> KeysValues:
    """What `caches` hold."""
    return [(c.keys, c.values) for c in caches if c.keys is not None and c.values is not None]


def _append(first: mx.array, second: mx.array) -> mx.array:
    rows = mx.broadcast_to(first, (second.shape[0], *first.shape[1:]))
    return mx.concatenate([rows, second], axis=2)
