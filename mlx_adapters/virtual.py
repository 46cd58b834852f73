"""Virtual tokens: what prompt-side adapters put before a text, and the one way to call a model with them.

Prompt tuning and P-tuning put token ids in front that only their embedding layer understands; prefix tuning
gives a cache that starts full. Everything here does nothing for other adapters, so training, evaluation and
generation call models through this file whatever the method is.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.methods.base import AdapterLayer

__all__ = ["all_with_virtual", "forward", "start_cache", "virtual_ids", "with_virtual"]


def virtual_ids(model: nn.Module) -> list[int]:
    """Token ids to put in front of every row; empty for most adapters."""
    return [token for layer in _layers(model) for token in layer.virtual_ids()]


def with_virtual(model: nn.Module, row: Sequence[int]) -> list[int]:
    """A row of token ids as the model wants it."""
    return [*virtual_ids(model), *row]


def all_with_virtual(model: nn.Module, rows: Iterable[Sequence[int]]) -> list[list[int]]:
    """`with_virtual` of many rows. The model's layers are walked once: that takes a millisecond."""
    front = virtual_ids(model)
    return [[*front, *row] for row in rows]


def start_cache(model: nn.Module, rows: int = 1) -> list[Any] | None:
    """A cache for `rows` rows that starts full; None where an empty one will do."""
    caches = [cache for layer in _layers(model) if (cache := layer.start_cache(model, rows)) is not None]
    return caches[0] if caches else None


def forward(
    model: nn.Module,
    ids: mx.array,
    *,
    backbone: Callable[..., mx.array] | None = None,
    cache: list[Any] | None = None,
) -> mx.array:
    """`model(ids)` for whole texts `ids` [rows, time] with the adapter's virtual tokens in front.

    The result [rows, time, ...] is the text's: positions of virtual tokens are cut off. `backbone` is called
    in the model's place, to get hidden states; `cache` stands in for the adapter's. One that has read
    something holds the virtual tokens too.
    """
    call = backbone or model
    front = virtual_ids(model) if not cache or cache[0].offset == 0 else []
    if front:
        ids = mx.concatenate([mx.broadcast_to(mx.array(front), (ids.shape[0], len(front))), ids], axis=1)
    cache = cache or start_cache(model, ids.shape[0])
    out: mx.array = call(ids) if cache is None else call(ids, cache=cache)
    return out[:, len(front) :]


def _layers(model: nn.Module) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]
