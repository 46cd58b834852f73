"""Several examples in one row: attention stays within each, and each starts at position 0.

Models of mlx-lm take their mask from the cache, so a stand-in cache without memory brings a block-diagonal
one. Positions restart in the modules that know them: rotary layers turn every token by its own position,
tables of learned positions look up its own row, and ALiBi needs neither, being of distances.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_adapters.adapter.call import call_model, start_cache, virtual_ids
from mlx_adapters.device import rounding
from mlx_adapters.errors import UnsupportedError
from mlx_adapters.models import sites

__all__ = ["Packing"]


class Packing:
    """Makes `model` able to read packed rows. `reading(starts)` says where the examples of a batch begin;
    in it, `caches()` are what the model has to be called with.

    Only modules of this model change, not their classes. Raises UnsupportedError where packed rows would
    give other logits than rows apart (that is tried), and for adapters with virtual tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        if virtual_ids(model) or start_cache(model) is not None:
            raise UnsupportedError("packing: this method's virtual tokens stand before a row. Leave it off")
        self.model = model
        self.starts: mx.array | None = None
        for path, module in model.named_modules():
            if sites.is_rotary(module) and not list(module.children().values()):
                module.__class__ = _turning(type(module), self)
            elif sites.is_position(path) and isinstance(module, nn.Embedding):
                module.__class__ = _looking_up(type(module), self)
        self._try()

    @contextmanager
    def reading(self, starts: np.ndarray | mx.array) -> Iterator[None]:
        """While tracing a batch and its gradient; `starts` int [rows, time] as in `Batch`."""
        self.starts = mx.array(starts)
        try:
            yield
        finally:
            self.starts = None

    def caches(self) -> list[Any]:
        """One stand-in cache for each layer."""
        assert self.starts is not None, "inside `reading` only"
        same = self.starts[:, :, None] == self.starts[:, None, :]
        return [_Apart(same[:, None])] * len(self.model.layers)

    def _try(self) -> None:
        rows = ((3, 4), (5, 2))  # two, with other starts: a mask can be right for one and wrong for more
        ids = mx.array([[1, 2, 3, 4, 3, 2, 1], [4, 3, 2, 1, 1, 2, 3]])
        starts = mx.array([[0] * first + [first] * second for first, second in rows])
        parts = [
            [call_model(self.model, part) for part in mx.split(ids[number : number + 1], [first], axis=1)]
            for number, (first, _) in enumerate(rows)
        ]
        expected = mx.concatenate([mx.concatenate(row, axis=1) for row in parts])
        try:
            with self.reading(starts):
                found = self.model(ids, cache=self.caches())
            error = float(mx.abs(found - expected).max() / mx.abs(expected).max())
        except Exception as problem:  # a model may want anything from its cache
            raise UnsupportedError(f"{self._refusal()} ({problem})") from None
        if not error <= rounding(expected.dtype):
            raise UnsupportedError(f"{self._refusal()} (logits differ by {error:.1e})")

    def _refusal(self) -> str:
        name = type(self.model).__module__.rpartition(".")[2]
        return f"packing: {name} cannot keep examples of one row apart. Leave it off"


class _Apart:
    """In the place of a key-value cache: remembers nothing, and masks all but the token's own example."""

    offset = 0
    keys = values = None

    def __init__(self, same: mx.array) -> None:
        self.same = same  # [rows, 1, time, time]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(
        self, time: int, return_array: bool = False, window_size: int | None = None, **_: Any
    ) -> mx.array:
        """Boolean [rows, 1, time, time]."""
        distance = mx.arange(time)[:, None] - mx.arange(time)[None]
        allowed = distance >= 0
        if window_size is not None:
            allowed = allowed & (distance < window_size)
        return self.same & allowed


def _turning(base: type, packing: Packing) -> type:
    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if packing.starts is None:
            result: mx.array = base.__call__(self, x, *args, **kwargs)
            return result
        rows, heads, time, width = x.shape
        position = mx.arange(time) - packing.starts[:, :time]
        # every token a row of its own: rotary kernels take an offset for each row
        tokens = x.transpose(0, 2, 1, 3).reshape(rows * time, heads, 1, width)
        turned = base.__call__(self, tokens, offset=position.reshape(-1))
        return turned.reshape(rows, time, heads, width).transpose(0, 2, 1, 3)

    return type(base.__name__, (base,), {"__call__": call})


def _looking_up(base: type, packing: Packing) -> type:
    def call(self: Any, ids: mx.array) -> mx.array:
        if packing.starts is not None:
            ids = ids - packing.starts[:, : ids.shape[-1]]
        result: mx.array = base.__call__(self, ids)
        return result

    return type(base.__name__, (base,), {"__call__": call})
