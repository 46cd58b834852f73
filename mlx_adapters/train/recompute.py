"""Gradient checkpointing: each decoder block is computed again in the backward pass instead of keeping what
it computed. Chen et al. 2016, https://arxiv.org/abs/1604.06174

Between the blocks one hidden state per token and layer stays alive, and inside one block at a time all its
activations: memory is exchanged for about a third more computation.

A block is differentiated only with respect to what is passed to it; its second computation is a new trace.
Three things follow that are easy to get silently wrong: the adapter's arrays go in as arguments, what a cache
or another object holds does too and comes out again (in a closure the gradient of a prefix, or of keys that
blocks share, would be exactly zero), and the block draws its dropout from a key that is an argument (else the
second trace would draw another mask). So the gradient is compared with the plain one before a run.

Not by `mx.checkpoint`: it lets the second computation start as soon as the first is done. Blocks with custom
gradients of their own were then all computed again at once, and twice the memory was alive.
"""

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_adapters.adapter.call import call_model, needs_cache
from mlx_adapters.device import rounding
from mlx_adapters.errors import UnsupportedError
from mlx_adapters.methods.dropout import drawing_from

__all__ = ["Recompute"]

P = ParamSpec("P")
R = TypeVar("R")


class Recompute:
    """Makes the blocks of `model.layers` able to compute themselves again; called with a gradient function,
    it returns one in which they do.

    Only these modules change, not their classes: other models in the process stay as they are. Raises
    UnsupportedError where the model has no list of blocks, or where the gradient would be another one: that
    is tried on a short text.
    """

    def __init__(self, model: nn.Module) -> None:
        blocks = getattr(model, "layers", None)
        if not isinstance(blocks, list) or not blocks:
            raise UnsupportedError(
                f"{type(model).__name__} has no list of blocks: leave gradient checkpointing off"
            )
        self.blocks = len(blocks)
        self._active: _Switch = getattr(blocks[0], "_recomputes", None) or _Switch()
        try:
            plain = _gradients(model)
        except ValueError:  # it has none at all, which the first step says
            plain = {}
        for block in blocks:
            if not hasattr(type(block), "_recomputes"):  # an earlier run of the same model did it
                block.__class__ = _recomputing(type(block), self._active)
        if plain:
            self._compare(model, plain)

    def __call__(self, gradient: Callable[P, R]) -> Callable[P, R]:
        def recomputed(*args: P.args, **kwargs: P.kwargs) -> R:
            self._active.on = True
            try:
                return gradient(*args, **kwargs)
            finally:
                self._active.on = False

        return recomputed

    def _compare(self, model: nn.Module, plain: dict[str, mx.array]) -> None:
        name = type(model).__module__.rpartition(".")[2]
        refusal = f"gradient checkpointing: the blocks of mlx-lm's {name} cannot be computed again"
        try:
            again = self(_gradients)(model)
        except Exception as error:  # a block may take and return anything
            raise UnsupportedError(f"{refusal} ({' '.join(str(error).split())}). Leave it off") from None
        for path, gradient in plain.items():
            apart = float(mx.abs(again[path] - gradient).max())
            if not apart <= rounding(gradient.dtype) * float(mx.abs(gradient).max()):
                raise UnsupportedError(f"{refusal}: the gradient of {path} would be wrong. Leave it off")


class _Switch:
    """Whether the blocks of a model compute themselves again."""

    on = False


def _gradients(model: nn.Module) -> dict[str, mx.array]:
    """Of a short text, without dropout: it draws other masks where blocks are computed again."""
    probe, was_training = mx.array([[1, 2, 3, 4, 2]]), model.training
    model.eval()

    def loss() -> mx.array:
        logits = call_model(model, probe[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, probe[:, 1:]).sum()

    needs_cache(model)
    gradients = dict(tree_flatten(nn.value_and_grad(model, loss)()[1]))
    mx.eval(gradients)
    model.train(was_training)
    return gradients


def _recomputing(base: type, active: _Switch) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not active.on:
            return base.__call__(self, *args, **kwargs)
        # such as a cache: what a block leaves there, other blocks may read
        objects = [leaf for _, leaf in tree_flatten((args, kwargs)) if hasattr(leaf, "__dict__")]

        def block(parameters: Any, inputs: Any, states: list[Any], key: mx.array) -> tuple[Any, list[Any]]:
            self.update(parameters)
            _set(objects, states)
            args, kwargs = inputs
            with drawing_from(mx.stop_gradient(key)):
                return base.__call__(self, *args, **kwargs), _states(objects)

        own = self.trainable_parameters()
        key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)
        result, states = _checkpoint(block)(own, (args, kwargs), _states(objects), key)
        self.update(own)  # the trace left its own placeholders behind
        _set(objects, states)
        return result

    return type(base.__name__, (base,), {"__call__": call, "_recomputes": active})


def _states(objects: list[Any]) -> list[dict[str, Any]]:
    return [dict(vars(one)) for one in objects]


def _set(objects: list[Any], states: list[dict[str, Any]]) -> None:
    for one, state in zip(objects, states, strict=True):
        vars(one).update(state)


_ARRAY = object()  # stands for an array of a tree


def _arrays(tree: Any) -> list[mx.array]:
    return [leaf for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)]


def _form(tree: Any) -> Any:
    """The tree without its arrays, which would keep alive what they were computed from."""
    return tree_map(lambda leaf: _ARRAY if isinstance(leaf, mx.array) else leaf, tree)


def _filled(form: Any, arrays: Sequence[mx.array]) -> Any:
    remaining = iter(arrays)
    return tree_map(lambda leaf: next(remaining) if leaf is _ARRAY else leaf, form)


def _checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of trees, computed again once the gradient of the arrays in its result is there."""

    def call(*trees: Any) -> Any:
        taken, made = _form(trees), None

        def flat(*arrays: mx.array) -> list[mx.array]:
            nonlocal made
            results = function(*_filled(taken, arrays))
            made = _form(results)
            return _arrays(results)

        again = mx.custom_function(flat)

        @again.vjp
        def pull(primals: Any, cotangents: Any, outputs: Any) -> Any:
            waiting = mx.depends(list(primals), list(cotangents))
            return mx.vjp(flat, waiting, list(cotangents))[1]

        results: Any = again(*_arrays(trees))
        return _filled(made, results)

    return call
