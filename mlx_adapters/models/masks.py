"""What a query may see, stated rather than written out: every earlier token, those of a window, those of its
own example in a packed row.

As an array such a mask has as many entries as attention has scores. Attention in blocks asks it which keys a
block of queries can see at all, and writes out only the blocks that are seen in part. Code that does want the
array gets it: MLX's functions ask an operand for `__mlx_array__`.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import base

__all__ = ["Mask", "create_attention_mask"]


@dataclass(frozen=True, eq=False)
class Mask:
    """Queries 0 .. time-1 are the last of `length` keys, and each sees the keys up to its own.

    Attributes:
        time: the number of queries.
        length: the number of keys.
        window: each sees that many keys at most, its own among them; None: all.
        example_start: int32 [rows, time], the first key that each query sees; None: key 0.
        host_start: the same on the host, where it is known there: what it hides need not be computed.
    """

    time: int
    length: int
    window: int | None = None
    example_start: mx.array | None = None
    host_start: np.ndarray | None = None

    @classmethod
    def of_row(cls, time: int, window: int | None) -> "Mask":
        """Of a row that nothing precedes."""
        return cls(time, time, window)

    def seen(self, first: int, last: int) -> tuple[int, int]:
        """The keys [begin, end) outside which queries `first` .. `last`-1 see nothing."""
        past = self.length - self.time
        begin = 0 if self.window is None else max(0, first + past - self.window + 1)
        if self.host_start is not None:
            begin = max(begin, int(self.host_start[:, first:last].min()))
        return begin, last + past

    def whole(self, queries: tuple[int, int], keys: tuple[int, int]) -> bool:
        """Whether each of the `queries` [first, last) is known to see all `keys` [first, last)."""
        past = self.length - self.time
        if keys[1] - 1 > queries[0] + past:
            return False
        if self.window is not None and queries[1] - 1 + past - keys[0] >= self.window:
            return False
        if self.example_start is None:
            return True
        return self.host_start is not None and int(self.host_start[:, slice(*queries)].max()) <= keys[0]

    def block(self, queries: tuple[int, int], keys: tuple[int, int]) -> mx.array:
        """The block [first, last) of queries and keys: boolean [queries, keys], with a first axis [rows, 1]
        where examples begin."""
        past = self.length - self.time
        own, key = mx.arange(queries[0] + past, queries[1] + past)[:, None], mx.arange(*keys)
        seen = own >= key
        if self.window is not None:
            seen = seen & (own - key < self.window)
        if self.example_start is not None:
            seen = seen & (self.example_start[:, None, slice(*queries), None] <= key)
        return seen

    @property
    def array(self) -> mx.array:
        """Boolean [time, length], or [rows, 1, time, length]. Made anew each time: a kept one would be that
        of one trace."""
        return self.block((0, self.time), (0, self.length))

    def __mlx_array__(self) -> mx.array:
        return self.array

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.array, name)

    def __getitem__(self, index: Any) -> mx.array:
        return self.array[index]

    def __and__(self, other: Any) -> mx.array:
        return self.array & other

    __rand__ = __and__

    def __invert__(self) -> mx.array:
        return mx.logical_not(self.array)


def create_attention_mask(
    h: mx.array, cache: Any = None, window_size: int | None = None, return_array: bool = False
) -> Any:
    """In place of `mlx_lm.models.base.create_attention_mask`: a `Mask` where that makes an array, without a
    cache and with one that has a `state_mask`. Other caches make their own."""
    time, state = h.shape[1], getattr(cache, "state_mask", None)
    if time == 1 or (cache and state is None):
        return base.create_attention_mask(h, cache, window_size, return_array)
    if state is None:
        state = Mask.of_row
    mask: Mask = state(time, window_size)
    plain = (
        mask.example_start is None and not return_array and not (window_size and mask.length > window_size)
    )
    return "causal" if plain else mask
