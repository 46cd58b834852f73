"""What all rows of a step begin with (the template's phrases, virtual tokens) is computed once.

Attention looks back only, so these tokens have the same states in every row. They are read on their own, the
rows go on from their keys and values, and the gradient comes back by the chain rule:

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

from mlx_adapters.adapter.call import call_model, start_cache
from mlx_adapters.data.batches import Batch
from mlx_adapters.device import rounding
from mlx_adapters.generate.prefill import common_prefix
from mlx_adapters.methods.dropout import Dropout

__all__ = [
    "SharedCache",
    "States",
    "after",
    "can_share",
    "going_on",
    "opening",
    "reading",
    "shared_length",
    "states_in",
    "untrained",
]

States = list[tuple[mx.array, mx.array]]  # of each layer: keys and values, [1, heads, tokens, width]

# So many tokens must be saved. The shared ones take passes over the weights of their own, which cost two x86
# cores as much as sixty tokens of the rows (a prefix of 23): four rows gained nothing, eight a sixteenth.
_WORTH = 128
_NOISE = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)


class SharedCache(KVCache):
    """Keys and values that stand before each row. One that `reads` keeps those of the row it is given too."""

    def __init__(self, keys: mx.array | None = None, values: mx.array | None = None, *, reads: bool) -> None:
        super().__init__()
        self.keys, self.values, self.reads = keys, values, reads
        self.offset = 0 if keys is None else keys.shape[2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is not None and self.values is not None:
            keys, values = _behind(self.keys, keys), _behind(self.values, values)
        if self.reads:
            self.keys, self.values, self.offset = keys, values, keys.shape[2]
        return keys, values


def reading(model: nn.Module) -> list[SharedCache]:
    """Caches to read the shared tokens into, behind what the adapter's cache starts with."""
    start = start_cache(model)
    if start is None:
        return [SharedCache(reads=True) for _ in make_prompt_cache(model)]
    return [SharedCache(cache.keys, cache.values, reads=True) for cache in start]


def going_on(states: States) -> list[SharedCache]:
    """Caches for rows that go on behind `states`."""
    return [SharedCache(keys, values, reads=False) for keys, values in states]


def states_in(caches: Sequence[SharedCache]) -> States:
    """What has been read into `caches`."""
    return [(c.keys, c.values) for c in caches if c.keys is not None and c.values is not None]


def can_share(model: nn.Module) -> bool:
    """Whether rows may share what they begin with, which is tried: False where logits would differ."""
    if any(_random(module) for module in model.modules()):
        return False
    own = model.trainable_parameters()
    key = mx.random.key(0)
    # a new adapter often changes nothing yet, and then could not be seen to look at places in the row
    model.update(tree_map(lambda array: array + 0.02 * mx.random.normal(array.shape, key=key), own))
    try:
        if not all(type(cache) is KVCache for cache in make_prompt_cache(model)):
            return False
        rows = mx.array([[1, 2, 3, 4, 3, 2], [1, 2, 3, 2, 2, 1]])
        expected = call_model(model, rows)
        caches = reading(model)
        first = call_model(model, rows[:1, :3], cache=caches)
        rest = call_model(model, rows[:, 3:], cache=going_on(states_in(caches)))
        found = mx.concatenate([mx.broadcast_to(first, (2, *first.shape[1:])), rest], axis=1)
        apart = mx.abs(found - expected).max() / mx.abs(expected).max()
        return bool(apart <= rounding(expected.dtype))
    except Exception:  # a model may want anything from its cache; without sharing it trains all the same
        return False
    finally:
        model.update(own)


def shared_length(window: Sequence[Batch], *, virtual: int) -> int:
    """How many leading tokens are the same in all rows of the batches of a step, if sharing them pays.

    `virtual` tokens of the adapter stand before each row and are saved with them.
    The last token they have in common is left to the rows: what follows it differs, and each learns its own.
    """
    if any(given.starts is not None for given in window):
        return 0
    rows = [row for given in window for row in given.ids.tolist()]
    length = max(0, common_prefix(rows) - 1)
    saved = (len(rows) - 1) * (length + virtual)
    return length if saved >= _WORTH else 0


def untrained(model: nn.Module) -> int:
    """How many of the first blocks come before all that trains: their states need no gradient."""
    blocks = [len(tree_flatten(block.trainable_parameters())) for block in model.layers]
    elsewhere = len(tree_flatten(model.trainable_parameters())) - sum(
        blocks
    )  # the embedding's, or a prefix's
    if elsewhere or len(blocks) != len(make_prompt_cache(model)):
        return 0
    return next((number for number, count in enumerate(blocks) if count), 0)


def opening(window: Sequence[Batch], length: int) -> Batch:
    """The shared tokens as a batch of one row; a target counts as often as it is supervised."""
    ids = window[0].ids[:1, : length + 1]
    mask = np.sum([given.mask[:, : length + 1].sum(axis=0) for given in window], axis=0, keepdims=True)
    return Batch(ids, mask.astype(np.float32), ids.size, int(mask.sum()))


def after(given: Batch, length: int) -> Batch:
    """What the rows have behind the shared tokens."""
    mask = given.mask[:, length:].copy()
    mask[:, 0] = 0  # a target of the shared tokens
    return replace(given, ids=given.ids[:, length:], mask=mask)


def _behind(first: mx.array, second: mx.array) -> mx.array:
    rows = mx.broadcast_to(first, (second.shape[0], *first.shape[1:]))
    return mx.concatenate([rows, second], axis=2)


def _random(module: nn.Module) -> bool:
    if isinstance(module, Dropout):
        return module.p > 0
    return isinstance(module, _NOISE) and module._p_1 < 1
