"""Read prompts into a KV cache: once, batched, with whatever the adapter puts in front."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_adapters.virtual import start_cache, with_virtual

__all__ = ["common_prefix", "prefill", "read_prefix", "right_padded", "shares", "splits"]


def splits(model: nn.Module) -> bool:
    """Whether each layer's cache has a batched form whose rows can be taken apart (some state-space layers'
    have none)."""
    return all(hasattr(cache, "merge") for cache in make_prompt_cache(model))


def shares(model: nn.Module) -> bool:
    """Whether a cache can be read once and go on in several rows: each layer's is a plain list of keys and
    values."""
    return all(type(cache) is KVCache for cache in make_prompt_cache(model))


def prefill(model: nn.Module, prompts: Sequence[Sequence[int]]) -> tuple[mx.array, list[Any]]:
    """(logits after each prompt [rows, vocabulary], the cache of all rows in batched form).

    `prompts` are of any length, without virtual tokens. Needs `splits(model)`.
    """
    rows = [with_virtual(model, prompt) for prompt in prompts]
    caches = [start_cache(model) or make_prompt_cache(model) for _ in rows]
    batch = [layer[0].merge(layer) for layer in zip(*caches)]
    bodies = [row[:-1] for row in rows]
    ids, padding = right_padded(bodies)
    if ids.shape[1]:
        if any(padding):
            for cache in batch:
                cache.prepare(lengths=[len(body) for body in bodies], right_padding=padding)
        model(ids, cache=batch)
        if any(padding):
            for cache in batch:
                cache.finalize()
        mx.eval([cache.state for cache in batch])
    last = mx.array([[row[-1]] for row in rows])
    return model(last, cache=batch)[:, -1], batch


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, at least one of each row left over."""
    if not rows:
        return 0
    first, last = min(rows), max(rows)  # all others lie between these two
    limit = min(len(row) for row in rows) - 1
    return next((i for i in range(limit) if first[i] != last[i]), max(limit, 0))


def read_prefix(model: nn.Module, prefix: Sequence[int]) -> list[Any]:
    """The cache of one row after `prefix`. Needs `shares(model)`."""
    cache = start_cache(model) or make_prompt_cache(model)
    model(mx.array([prefix]), cache=cache)
    for layer in cache:  # without the room that a cache keeps to grow
        layer.state = (layer.keys[..., : layer.offset, :], layer.values[..., : layer.offset, :])
    mx.eval([layer.state for layer in cache])
    return cache


def right_padded(rows: Sequence[Sequence[int]]) -> tuple[mx.array, list[int]]:
    """(rows as one array [rows, longest], how many zeros stand at each row's end)."""
    longest = max(len(row) for row in rows)
    padding = [longest - len(row) for row in rows]
    flat = [token for row, pad in zip(rows, padding) for token in [*row, *[0] * pad]]
    return mx.array(flat, dtype=mx.int32).reshape(len(rows), longest), padding
