"""Several examples in one row: attention stays within each, and each starts at position 0.

Models of mlx-lm take their mask from the cache, so a stand-in without memory (`caches.ExampleCache`) brings a
block-diagonal one. Positions restart in the modules that know them: rotary layers turn every token by its own
position, tables of learned positions look up its own row, and ALiBi needs neither, being of distances.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.adapter.call import call_model, start_cache, virtual_ids
from mlx_adapters.data.batches import Batch
from mlx_adapters.device import rounding
from mlx_adapters.errors import UnsupportedError
from mlx_adapters.models import sites
from mlx_adapters.rebind import replace_call
from mlx_adapters.train.caches import ExampleCache
from mlx_adapters.train.step import GradientFn, LossAndGradients, Parameters, Prefix

__all__ = ["packing"]


class _Rows:
    """Where the examples of the rows begin that the model is reading; None where no row is packed."""

    example_start: mx.array | None = None

    @contextmanager
    def reading(self, example_start: mx.array | None) -> Iterator[None]:
        self.example_start = example_start
        try:
            yield
        finally:
            self.example_start = None


def packing(model: nn.Module) -> Callable[[GradientFn], GradientFn]:
    """Make `model` able to read packed rows, and return what makes a gradient function do so.

    Only modules of this model change, not their classes. Raises UnsupportedError where packed rows would
    give other logits than rows apart (that is tried), and for adapters with virtual tokens.
    """
    if virtual_ids(model) or start_cache(model) is not None:
        raise UnsupportedError("packing: this method's virtual tokens stand before a row. Leave it off")
    rows = _Rows()
    for path, module in model.named_modules():
        if sites.is_rotary(module) and not list(module.children().values()):
            module.__class__ = _rotary(type(module), rows)
        elif sites.is_position(path) and isinstance(module, nn.Embedding):
            module.__class__ = _learned(type(module), rows)
    _try(model, rows)

    def pack(gradient: GradientFn) -> GradientFn:
        def packed(parameters: Parameters, prefix: Prefix, batch: Batch) -> LossAndGradients:
            with rows.reading(batch.example_start):  # the backward pass too: it may compute blocks again
                return gradient(parameters, prefix, batch)

        return packed

    return pack


def _try(model: nn.Module, packed: _Rows) -> None:
    rows = ((3, 4), (5, 2))  # two, with other starts: a mask can be right for one and wrong for more
    ids = mx.array([[1, 2, 3, 4, 3, 2, 1], [4, 3, 2, 1, 1, 2, 3]])
    example_start = mx.array([[0] * first + [first] * second for first, second in rows])
    parts = [
        [call_model(model, part) for part in mx.split(ids[number : number + 1], [first], axis=1)]
        for number, (first, _) in enumerate(rows)
    ]
    expected = mx.concatenate([mx.concatenate(row, axis=1) for row in parts])
    name = type(model).__module__.rpartition(".")[2]
    refusal = f"packing: {name} cannot keep examples of one row apart. Leave it off"
    try:
        with packed.reading(example_start):
            found = model(ids, cache=[ExampleCache(example_start)] * len(model.layers))
        error = float(mx.abs(found - expected).max() / mx.abs(expected).max())
    except Exception as problem:  # a model may want anything from its cache
        raise UnsupportedError(f"{refusal} ({problem})") from None
    if not error <= rounding(expected.dtype):
        raise UnsupportedError(f"{refusal} (logits differ by {error:.1e})")


def _rotary(base: type, rows: _Rows) -> type:
    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if rows.example_start is None:
            result: mx.array = base.__call__(self, x, *args, **kwargs)
            return result
        count, heads, time, width = x.shape
        position = mx.arange(time) - rows.example_start[:, :time]
        # every token a row of its own: rotary kernels take an offset for each row
        tokens = x.transpose(0, 2, 1, 3).reshape(count * time, heads, 1, width)
        turned = base.__call__(self, tokens, offset=position.reshape(-1))
        return turned.reshape(count, time, heads, width).transpose(0, 2, 1, 3)

    return replace_call(base, call)


def _learned(base: type, rows: _Rows) -> type:
    def call(self: Any, ids: mx.array) -> mx.array:
        if rows.example_start is not None:
            ids = ids - rows.example_start[:, : ids.shape[-1]]
        result: mx.array = base.__call__(self, ids)
        return result

    return replace_call(base, call)
