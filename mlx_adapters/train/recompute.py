"""Gradient checkpointing: each decoder block is computed again in the backward pass instead of keeping what
it computed. Chen et al. 2016, https://arxiv.org/abs/1604.06174

Between the blocks one hidden state per token and layer stays alive, and inside one block at a time all its
activations: memory is exchanged for about a third more computation.

A block is differentiated only with respect to what is passed to it; its second computation is a new trace.
Three things follow that are easy to get silently wrong: the adapter's arrays go in as arguments, the keys and
values of a prefix do too (in a closure their gradient would be exactly zero), and the block draws its dropout
from a key that is an argument (else the second trace would draw another mask).

Not by `mx.checkpoint`: it lets the second computation start as soon as the first is done. Blocks with custom
gradients of their own were then all computed again at once, and twice the memory was alive.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_adapters.errors import UnsupportedError
from mlx_adapters.methods.base import drawing_from

__all__ = ["recompute_blocks"]


def recompute_blocks(model: nn.Module) -> int:
    """Let every block of `model.layers` recompute itself while training; returns how many there are.

    Only these modules change, not their classes: other models in the process stay as they are. Raises
    UnsupportedError where the model has no list of blocks.
    """
    blocks = getattr(model, "layers", None)
    if not isinstance(blocks, list) or not blocks:
        raise UnsupportedError(
            f"{type(model).__name__} has no list of blocks: leave gradient checkpointing off"
        )
    for block in blocks:
        if not getattr(type(block), "_recomputes", False):
            block.__class__ = _recomputing(type(block))
    return len(blocks)


def _recomputing(base: type) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        arrays = [value for value in given if isinstance(value, mx.array)]
        cache: Any = next((value for value in given if hasattr(value, "update_and_fetch")), None)
        if not self.training or getattr(cache, "reads", False):  # the few tokens that rows share are kept
            return base.__call__(self, *args, **kwargs)
        start = [] if cache is None or cache.keys is None else [cache.keys, cache.values]
        offset = getattr(cache, "offset", 0)

        def block(parameters: Any, arrays: list[mx.array], start: list[mx.array], key: mx.array) -> Any:
            self.update(parameters)
            if start:
                cache.keys, cache.values, cache.offset = *start, offset
            remaining = iter(arrays)
            values = [next(remaining) if isinstance(value, mx.array) else value for value in given]
            named = dict(zip(kwargs, values[len(args) :], strict=True))
            with drawing_from(mx.stop_gradient(key)):
                return base.__call__(self, *values[: len(args)], **named)

        own = self.trainable_parameters()
        key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)
        result = _checkpoint(block)(own, arrays, start, key)
        self.update(own)  # the trace left its own placeholders behind
        return result

    return type(base.__name__, (base,), {"__call__": call, "_recomputes": True})


def _checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of trees of arrays, computed again once the gradient of its result is there."""

    def call(*given: Any) -> Any:
        named = tree_flatten(given)
        names = [name for name, _ in named]
        kept: list[str] = []  # names of the results; a single array has the name ""

        def flat(*arrays: mx.array) -> list[mx.array]:
            results = tree_flatten(function(*tree_unflatten(list(zip(names, arrays, strict=True)))))
            kept[:] = [name for name, _ in results]
            return [array for _, array in results]

        again = mx.custom_function(flat)

        @again.vjp
        def pull(primals: Any, cotangents: Any, outputs: Any) -> Any:
            waiting = mx.depends(list(primals), list(cotangents))
            return mx.vjp(flat, waiting, list(cotangents))[1]

        results = again(*[array for _, array in named])
        return tree_unflatten(list(zip(kept, results, strict=True)))  # type: ignore[call-overload]

    return call
