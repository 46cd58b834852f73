"""Attention as the layers of a model call it: in blocks where that is best, else as MLX computes it.

On a CPU that is always so in float32: MLX's exponential is scalar code there, and what a mask hides is not
computed. On a GPU it is so where gradients are taken of rows so long that MLX would keep too many scores.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from mlx_adapters import device
from mlx_adapters import rebind as rebinding
from mlx_adapters.models.attention_blocks import HIDDEN, SCORES, Blocks, by_group
from mlx_adapters.models.masks import Mask, create_attention_mask

__all__ = ["attention", "differentiated", "kept_scores", "rebind"]

# On a GPU MLX's own kernel is faster while it keeps no more scores than these of a layer (64 MB in float32).
_MOST_SCORES = 1 << 24


class _Switch:
    """Whether gradients are being taken."""

    on = False


@contextmanager
def differentiated() -> Iterator[None]:
    """Around what takes gradients: attention over long rows then keeps no scores on a GPU either."""
    before, _Switch.on = _Switch.on, True
    try:
        yield
    finally:
        _Switch.on = before


def rebind(model: nn.Module) -> None:
    """Let the model's layers call `attention` of this module instead of mlx-lm's, with masks that it can ask
    what they hide."""
    replaced: dict[Any, Any] = {base.scaled_dot_product_attention: attention}
    if not any(_asks_mlx(type(module)) for module in model.modules()):
        replaced[base.create_attention_mask] = create_attention_mask
    rebinding.rebind(model, replaced)


def _asks_mlx(kind: type) -> bool:
    """Whether a module calls MLX's own attention, which takes masks as arrays only."""
    names = [code.co_names for code in _codes(kind)]
    return any("fast" in some and "scaled_dot_product_attention" in some for some in names)


def _codes(kind: type) -> list[Any]:
    """The code of a class's methods."""
    methods = [getattr(method, "__code__", None) for part in kind.__mro__ for method in vars(part).values()]
    return [code for code in methods if code is not None]


def kept_scores(model: nn.Module, scores: int) -> int:
    """How many of a layer's `scores`, one for each row, head, query and key, are kept at once at most while
    gradients are taken: all of them where the layers compute attention without this module."""
    kinds = {type(module) for module in model.modules()}
    names = {name for kind in kinds for code in _codes(kind) for name in code.co_names}
    if "scaled_dot_product_attention" not in names or any(map(_asks_mlx, kinds)):
        return scores
    return min(scores, SCORES if device.on_cpu() else _MOST_SCORES)


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
    cap: float | None = None,
) -> mx.array:
    """Attention in place of `mlx_lm.models.base.scaled_dot_product_attention`, shapes and masks alike:
    queries [rows, heads, time, width], keys and values [rows, kv heads, length, width].

    `cap` bounds the scores: cap * tanh(scores / cap). `mask` may also be a `Mask`.
    """
    scores = queries.shape[0] * queries.shape[1] * queries.shape[2] * keys.shape[2]
    fast = device.on_cpu() and queries.dtype == keys.dtype == values.dtype == mx.float32
    if hasattr(cache, "bits") or not (fast or (_Switch.on and scores > _MOST_SCORES)):
        mask = mask.array if isinstance(mask, Mask) else mask
        if cap is not None:
            return _capped(queries, keys, values, scale, mask, cap)
        return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    if queries.shape[2] == 1 and sinks is None and cap is None:
        return _one_query(queries, keys, values, scale, mask)
    given = [] if mask is None or isinstance(mask, str | Mask) else [mask]
    if isinstance(mask, str):  # "causal", the queries being the last of the keys
        mask = Mask(queries.shape[2], keys.shape[2])
    blocks = Blocks(queries, keys, scale, mask if not given else None, cap, sinks is not None)
    given += [] if sinks is None else [sinks]
    return blocks.attend(queries, keys, values, *given)


def _one_query(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any) -> mx.array:
    """The heads of a group are the rows of one product: many products of one row are slow."""
    rows, heads, _, width = queries.shape
    groups = keys.shape[1]
    scores = (queries * scale).reshape(rows, groups, -1, width) @ keys.swapaxes(-1, -2)
    if mask is not None and not isinstance(mask, str):  # which hides nothing of the last query
        mask = mask.array if isinstance(mask, Mask) else mask
        mask = by_group(mask, groups)[:, :, :, 0]
        scores = mx.where(mask, scores, HIDDEN) if mask.dtype == mx.bool_ else scores + mask
    return (mx.softmax(scores, axis=-1, precise=True) @ values).reshape(rows, heads, 1, -1)


def _capped(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any, cap: float
) -> mx.array:
    rows, heads, time, width = queries.shape
    groups = keys.shape[1]
    q = (queries * scale).reshape(rows, groups, heads // groups, time, width)
    scores = cap * mx.tanh(q @ keys[:, :, None].swapaxes(-1, -2) / cap)
    if isinstance(mask, str):
        mask = Mask(time, keys.shape[2]).array
    if mask is not None:
        mask = by_group(mask, groups)
        hidden = mx.array(mx.finfo(scores.dtype).min, scores.dtype)
        scores = mx.where(mask, scores, hidden) if mask.dtype == mx.bool_ else scores + mask
    seen = mx.softmax(scores, axis=-1, precise=True) @ values[:, :, None]
    return seen.reshape(rows, heads, time, values.shape[-1])
