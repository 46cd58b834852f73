"""What the optimizer makes of a step's gradient: clipped, judged, applied. A bad step changes nothing.

One function of arrays, so that it can be compiled: hundreds of small arrays, a dozen operations on each, are
then a few kernels apiece on a GPU.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

__all__ = ["Update"]


class Update:
    """Applies gradients to what trains in `model`; a norm above `clip` is scaled down to it."""

    def __init__(
        self, model: nn.Module, optimizer: optim.Optimizer, *, clip: float, compiled: bool = False
    ) -> None:
        self.model, self.optimizer = model, optimizer
        function = _tracing(optimizer, clip or math.inf)
        self._function = mx.compile(function) if compiled else function

    def __call__(
        self, gradients: Any, loss: mx.array, count: int, most: float
    ) -> tuple[mx.array, mx.array, mx.array]:
        """(mean loss, norm of its gradient, whether the step was taken), from the sums over `count` targets.

        A step is bad where one of the two is not finite, or the loss above `most`.
        """
        weights, state = self.model.trainable_parameters(), self.optimizer.state
        bounds = mx.array(float(count)), mx.array(most)
        try:
            weights, state, *judged = self._function(weights, state, gradients, loss, *bounds)
        finally:
            self.optimizer.state = state  # a trace leaves its own placeholders behind
        self.model.update(weights)
        mean, norm, good = judged
        return mean, norm, good


def _tracing(optimizer: optim.Optimizer, clip: float) -> Callable[..., Any]:
    def update(
        weights: Any, state: Any, gradients: Any, loss: mx.array, count: mx.array, most: mx.array
    ) -> tuple[Any, ...]:
        # The mean over the whole step's targets: a batch with few of them does not weigh more per token.
        mean = loss / count
        gradients, norm = optim.clip_grad_norm(tree_map(lambda g: g / count, gradients), clip)
        good = mx.isfinite(mean) & mx.isfinite(norm) & (mean <= most)
        old = dict(tree_flatten(state))
        optimizer.state = tree_map(lambda array: array, state)  # updated in place
        new_weights = optimizer.apply_gradients(gradients, weights)

        def chosen(path: str, new: mx.array) -> mx.array:
            counts = path.rpartition(".")[2] in ("step", "learning_rate")  # they go on in a bad step too
            return new if counts or path not in old else mx.where(good, new, old[path])

        new_state = tree_unflatten([(k, chosen(k, v)) for k, v in tree_flatten(optimizer.state)])
        kept = tree_map(lambda new, old: mx.where(good, new, old), new_weights, weights)
        return kept, new_state, mean, norm, good

    return update
