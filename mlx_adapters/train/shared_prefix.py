"""What all rows of a step begin with (the template's phrases, virtual tokens) is computed once.

Attention looks back only, so these tokens have the same states in every row. They are read on their own, the
rows continue from their keys and values, and the gradient comes back by the chain rule:

    S = keys and values of the shared tokens,  loss = sum over rows of loss_row(theta, S(theta))
    d loss / d theta = sum over rows of d loss_row / d theta  +  (sum of d loss_row / d S) dS / d theta

Nothing is approximated. It needs a model whose memory is keys and values, and no noise: with dropout every
row has a mask of its own.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_adapters.adapter.call import call_model, start_cache, virtual_ids
from mlx_adapters.data.batches import Batch
from mlx_adapters.device import rounding
from mlx_adapters.generate.prefill import common_prefix
from mlx_adapters.methods.dropout import Dropout
from mlx_adapters.models import attention
from mlx_adapters.train.caches import KeysValues, PrefixCache, keys_and_values, prefix_cache
from mlx_adapters.train.compile import Compiled
from mlx_adapters.train.loss import Head, loss_sum
from mlx_adapters.train.step import LossAndGradients, Parameters, Prefix, StepGradientFn

__all__ = ["can_share", "drop_prefix", "prefix_batch", "share_prefix", "shared_length", "untrained"]

# So many tokens must be saved. The shared ones take passes over the weights of their own, which cost two x86
# cores as much as sixty tokens of the rows (a prefix of 23): four rows gained nothing, eight a sixteenth.
_WORTH = 128
_NOISE = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)


def share_prefix(
    gradient: StepGradientFn, model: nn.Module, head: Head | None, *, compiled: bool = False
) -> StepGradientFn:
    """`gradient`, with the tokens that all rows of a step begin with computed once where that pays."""

    def read(parameters: Parameters, prefix: Prefix, first: Batch) -> KeysValues:
        """Keys and values of the shared tokens."""
        model.update(parameters)
        caches = _growing_cache(model)
        call_model(model, first.ids[:, :-1], cache=caches)
        return keys_and_values(caches)

    def pull_back(parameters: Parameters, slopes: KeysValues, first: Batch) -> tuple[mx.array, Parameters]:
        """Loss of the shared tokens, and the gradient of all that they do; `slopes` is the gradient of the
        rows' loss with respect to the shared keys and values."""

        def loss(parameters: Parameters) -> tuple[mx.array, mx.array]:
            model.update(parameters)
            caches, own, onward = _growing_cache(model), mx.array(0.0), mx.array(0.0)
            if first.labels.size:
                own = loss_sum(model, first, head=head, cache=caches)
            else:
                call_model(model, first.ids[:, :-1], cache=caches)
            states = keys_and_values(caches)[len(caches) - len(slopes) :]
            for pair, slope in zip(states, slopes, strict=True):
                onward = onward + (pair[0] * slope[0]).sum() + (pair[1] * slope[1]).sum()
            return own + onward, own

        with attention.differentiated():
            (_, own), gradients = mx.value_and_grad(loss)(parameters)
        return own, gradients

    reader, puller = (Compiled(read), Compiled(pull_back)) if compiled else (read, pull_back)
    below, virtual = untrained(model), len(virtual_ids(model))

    def shared(parameters: Parameters, prefix: Prefix, batches: Sequence[Batch]) -> LossAndGradients:
        length = shared_length(batches, virtual=virtual)
        if not length:
            return gradient(parameters, prefix, batches)
        first, rest = prefix_batch(batches, length), [drop_prefix(batch, length) for batch in batches]
        states = reader(parameters, prefix, first)
        loss, (gradients, slopes) = gradient(parameters, (states[:below], states[below:]), rest)
        own, pulled = puller(parameters, slopes, first)
        return loss + own, (tree_map(mx.add, gradients, pulled), [])

    return shared


def can_share(model: nn.Module) -> bool:
    """Whether rows may share what they begin with, which is tried: False where logits would differ."""
    if any(_random(module) for module in model.modules()):
        return False
    own = model.trainable_parameters()
    key = mx.random.key(0)
    # A fresh adapter is often the identity: perturb it before testing whether it depends on the position.
    model.update(tree_map(lambda array: array + 0.02 * mx.random.normal(array.shape, key=key), own))
    try:
        if not all(type(cache) is KVCache for cache in make_prompt_cache(model)):
            return False
        rows = mx.array([[1, 2, 3, 4, 3, 2], [1, 2, 3, 2, 2, 1]])
        expected = call_model(model, rows)
        caches = _growing_cache(model)
        first = call_model(model, rows[:1, :3], cache=caches)
        rest = call_model(model, rows[:, 3:], cache=prefix_cache(keys_and_values(caches)))
        found = mx.concatenate([mx.broadcast_to(first, (2, *first.shape[1:])), rest], axis=1)
        apart = mx.abs(found - expected).max() / mx.abs(expected).max()
        return bool(apart <= rounding(expected.dtype))
    except Exception:  # a model may want anything from its cache; without sharing it trains all the same
        return False
    finally:
        model.update(own)


def shared_length(batches: Sequence[Batch], *, virtual: int) -> int:
    """How many leading tokens are the same in all rows of the batches of a step, if sharing them pays.

    `virtual` tokens of the adapter stand before each row and are saved with them.
    The last token they have in common is left to the rows: what follows it differs, and each learns its own.
    """
    if any(batch.example_start is not None for batch in batches):
        return 0
    rows = [row for batch in batches for row in np.array(batch.ids).tolist()]
    length = max(0, common_prefix(rows) - 1)
    saved = (len(rows) - 1) * (length + virtual)
    return length if saved >= _WORTH else 0


def untrained(model: nn.Module) -> int:
    """How many of the first blocks come before all that trains: their keys and values need no gradient."""
    blocks = [len(tree_flatten(block.trainable_parameters())) for block in model.layers]
    everything = len(tree_flatten(model.trainable_parameters()))
    if everything != sum(blocks) or len(blocks) != len(make_prompt_cache(model)):
        return 0  # the embedding trains too, or a prefix
    return next((number for number, count in enumerate(blocks) if count), 0)


def prefix_batch(batches: Sequence[Batch], length: int) -> Batch:
    """The shared tokens as a batch of one row; a label counts as often as rows have it."""
    ids = np.array(batches[0].ids)[:1, : length + 1]
    masks = [batch.label_mask[:, : length + 1].sum(axis=0) for batch in batches]
    mask = np.sum(masks, axis=0, keepdims=True)
    batch = Batch.from_mask(ids, mask, tokens=ids.size, supervised=int(mask.sum()))
    if batch.supervised:
        return batch
    none = mx.zeros((0,), mx.int32)
    return replace(batch, positions=none, labels=none, weights=none.astype(mx.float32))


def drop_prefix(batch: Batch, length: int) -> Batch:
    """`batch` without the shared tokens, and without the labels among them."""
    mask = batch.label_mask[:, length:]
    mask[:, 0] = 0
    ids = np.array(batch.ids)[:, length:]
    return Batch.from_mask(ids, mask, tokens=batch.tokens, supervised=batch.supervised)


def _growing_cache(model: nn.Module) -> list[PrefixCache]:
    """Caches for the prefix, pre-filled with the adapter's own keys and values."""
    start = start_cache(model)
    if start is None:
        return [PrefixCache(grows=True) for _ in make_prompt_cache(model)]
    return [PrefixCache(cache.keys, cache.values, grows=True) for cache in start]


def _random(module: nn.Module) -> bool:
    if isinstance(module, Dropout):
        return module.p > 0
    return isinstance(module, _NOISE) and module._p_1 < 1
