"""One training step, to be read from top to bottom.

    loss_fn          the summed loss of a batch
    value_and_grad   the loss, and its gradient with respect to the adapter
    accumulate       both, added up over the batches of a step
    make_update      mean over the labels, clipping, optimizer; a bad step changes nothing
    train_step       all of them, in their order

What makes a step cheaper wraps a gradient function and returns one: `packing` keeps the examples of a row
apart, `recompute` keeps fewer activations, `compile` traces the function, `shared_prefix` computes once what
all rows begin with. `Run.gradient_fn` puts them together.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_adapters.data.batches import Batch
from mlx_adapters.models import attention
from mlx_adapters.train.caches import ExampleCache, KeysValues, prefix_cache
from mlx_adapters.train.distributed import Processes
from mlx_adapters.train.loss import Head, loss_sum, undifferentiable
from mlx_adapters.train.progress import StepOutcome
from mlx_adapters.train.router_loss import balanced_sum

__all__ = ["GradientFn", "StepGradientFn", "UpdateFn", "accumulate", "loss_fn", "make_update"]
__all__ += ["train_step", "value_and_grad"]

Parameters = dict[str, Any]  # a tree of arrays
Prefix = tuple[KeysValues, KeysValues]
"""What precedes every row: in the blocks below the first one that trains, and in the others."""
LossAndGradients = tuple[mx.array, tuple[Parameters, KeysValues]]
"""The gradients are those with respect to the parameters, and to the second part of the prefix."""
GradientFn = Callable[[Parameters, Prefix, Batch], LossAndGradients]
StepGradientFn = Callable[[Parameters, Prefix, Sequence[Batch]], LossAndGradients]
Updated = tuple[Parameters, Parameters, mx.array, mx.array, mx.array]
UpdateFn = Callable[..., Updated]


def loss_fn(
    parameters: Parameters,
    above: KeysValues,
    below: KeysValues,
    model: nn.Module,
    batch: Batch,
    head: Head | None,
    router_aux_loss: float = 0.0,
) -> mx.array:
    """Sum of the token losses of `batch`; `below` and `above` hold what precedes each row, if anything."""
    model.update(parameters)
    cache: list[Any] | None = prefix_cache(below + above) or None
    if batch.example_start is not None:
        cache = [ExampleCache(batch.example_start, batch.host_start)] * len(model.layers)
    if router_aux_loss:
        return balanced_sum(model, batch, head=head, cache=cache, share=router_aux_loss)
    return loss_sum(model, batch, head=head, cache=cache)


def value_and_grad(model: nn.Module, head: Head | None, *, router_aux_loss: float = 0.0) -> GradientFn:
    """`loss_fn` and its gradient. Raises UnsupportedError for a model that cannot be differentiated."""

    def gradient(parameters: Parameters, prefix: Prefix, batch: Batch) -> LossAndGradients:
        below, above = prefix
        differentiated = mx.value_and_grad(loss_fn, argnums=(0, 1))
        arguments = (parameters, above, below, model, batch, head, router_aux_loss)
        try:
            with attention.differentiated():
                return differentiated(*arguments)
        except ValueError as error:
            raise undifferentiable(model, error) from None

    return gradient


def accumulate(gradient: GradientFn) -> StepGradientFn:
    """The sums of loss and gradient over the batches of a step, one batch after the other."""

    def accumulated(parameters: Parameters, prefix: Prefix, batches: Sequence[Batch]) -> LossAndGradients:
        loss, sums = gradient(parameters, prefix, batches[0])
        for batch in batches[1:]:
            mx.eval(loss, sums)  # else the activations of all batches are alive together
            value, gradients = gradient(parameters, prefix, batch)
            loss, sums = loss + value, tree_map(mx.add, sums, gradients)
        if len(batches) > 1:
            mx.eval(loss, sums)
        return loss, sums

    return accumulated


def make_update(optimizer: optim.Optimizer, clip: float, *, compiled: bool = False) -> UpdateFn:
    """The update as a function (weights, optimizer state, summed gradients, summed loss, number of labels,
    max_loss) -> (weights, optimizer state, mean loss, norm of the mean gradient, whether the step was good).
    A step is bad where the loss or the norm is not finite, or the loss is above `max_loss`.
    """

    def update(
        weights: Parameters, state: Any, gradients: Parameters, loss: mx.array, count: mx.array, max_loss: Any
    ) -> Updated:
        # The mean over the labels of the whole step: a batch with few of them does not weigh more per token.
        mean = loss / count
        gradients, norm = optim.clip_grad_norm(tree_map(lambda g: g / count, gradients), clip or math.inf)
        good = mx.isfinite(mean) & mx.isfinite(norm) & (mean <= max_loss)
        old, own = dict(tree_flatten(state)), optimizer.state
        optimizer.state = tree_map(lambda array: array, state)  # updated in place
        new_weights = optimizer.apply_gradients(gradients, weights)
        new, optimizer.state = tree_flatten(optimizer.state), own

        def chosen(path: str, array: mx.array) -> mx.array:
            counts = path.rpartition(".")[2] in ("step", "learning_rate")  # they go on in a bad step too
            return array if counts or path not in old else mx.where(good, array, old[path])

        new_state = tree_unflatten([(path, chosen(path, array)) for path, array in new])
        weights = tree_map(lambda new, old: mx.where(good, new, old), new_weights, weights)
        return weights, new_state, mean, norm, good

    return mx.compile(update) if compiled else update


def train_step(
    model: nn.Module,
    optimizer: optim.Optimizer,
    gradient: StepGradientFn,
    update: UpdateFn,
    batches: Sequence[Batch],
    *,
    max_loss: float = math.inf,
    processes: Processes | None = None,
    stop: bool = False,
) -> StepOutcome:
    """Train `model` on the batches of one step. The device is waited for once, at the end."""
    parameters = model.trainable_parameters()
    try:
        loss, (gradients, _) = gradient(parameters, ([], []), batches)
    finally:
        model.update(parameters)  # a trace leaves its placeholders there
    mx.async_eval(loss, gradients)  # apart from the update: its order of evaluation needs more memory
    stops = mx.array(float(stop))
    (loss, stops), gradients = (processes or Processes()).sums([loss, stops], gradients)
    count = mx.array(float(max(1, sum(batch.supervised for batch in batches))))
    updated = update(parameters, optimizer.state, gradients, loss, count, mx.array(max_loss))
    weights, optimizer.state, mean, norm, good = updated
    model.update(weights)
    mx.eval(weights, optimizer.state, mean, norm, good, stops)
    return StepOutcome(float(mean), float(norm), bool(good), float(stops) > 0)
