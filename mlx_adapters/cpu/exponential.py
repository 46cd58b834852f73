"""A faster exponential for the CPU, and what is made of it: SwiGLU and attention.

MLX's exponential is scalar code on x86 and took a quarter of a training step. This one is Cephes' (Moshier):
a few products and sums, which MLX computes in vectors, and in one pass where nothing is differentiated and a
C++ compiler is there for `mx.compile` (it falls back by itself).

    e^x = 2^k e^r,  k = round(x / ln 2),  |r| <= ln 2 / 2

SwiGLU and attention have gradients of their own that compute again what is cheap instead of keeping it:

    swiglu(g, u) = g s u,  s = 1 / (1 + e^-g);   dg = dy u (s + g s (1 - s)),  du = dy g s
    o = E v / z,  E = exp(q k^T - max), z = row sums of E;   with c = do / z:
    dv = E^T c,  dS = E * (c v^T - rowsum(c * o)),  dq = dS k,  dk = dS^T q

All of it is for float32; other types take MLX's way.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, base

from mlx_adapters import rebind as rebinding

__all__ = ["attention", "exp", "rebind", "shifted_exp", "swiglu"]

# At and below the lower bound 2^k is 0: what a mask has hidden gets no weight at all. Above the upper one the
# result would not be finite.
_LOW, _HIGH = -88.0, 88.0
_ROUND = 12582912.0  # 1.5 * 2^23: a float32 that is added to it is rounded to a whole number
_LN2 = (0.693359375, -2.12194440e-4)  # ln 2 in two parts, the first one exact
_SERIES = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_HIDDEN = -3.0e38  # a score that no real one reaches
# Scores of a call (16 MB). Not compiled, the exponential has five arrays of their size alive, MLX's softmax
# one.
_MOST_SCORES = 1 << 22


def exp(x: mx.array) -> mx.array:
    """e^x for float32, relative error below 2e-7; 0 below -88, e^88 above 88."""
    x = mx.clip(x, _LOW, _HIGH)
    shifted = x * (1 / math.log(2)) + _ROUND
    k = shifted - _ROUND
    r = x - k * _LN2[0] - k * _LN2[1]
    series = mx.array(_SERIES[0])
    for coefficient in _SERIES[1:]:
        series = series * r + coefficient
    power = ((shifted.view(mx.int32) << 23) + (127 << 23)).view(mx.float32)
    return (series * (r * r) + r + 1.0) * power


@mx.compile
def shifted_exp(x: mx.array, most: mx.array) -> mx.array:
    """e^(x - most) for float32."""
    return exp(x - most)


@mx.compile
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * up / (1.0 + exp(-gate))


@mx.compile
def _swiglu_slopes(gate: mx.array, up: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = 1.0 / (1.0 + exp(-gate))
    silu = gate * sigmoid
    return cotangent * up * (sigmoid + silu * (1.0 - sigmoid)), cotangent * silu


@mx.custom_function
def _gated(gate: mx.array, up: mx.array) -> mx.array:
    return _swiglu(gate, up)


@_gated.vjp
def _gated_vjp(primals: Any, cotangent: mx.array, output: Any) -> tuple[mx.array, mx.array]:
    gate, up = primals
    return _swiglu_slopes(gate, up, cotangent)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x, in place of `mlx_lm.models.activations.swiglu`."""
    if gate.dtype != mx.float32 or x.dtype != mx.float32 or gate.shape != x.shape:
        return activations.swiglu(gate, x)
    return _gated(gate, x)  # type: ignore[return-value]


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention in place of `mlx_lm.models.base.scaled_dot_product_attention`, shapes and masks alike:
    queries [rows, heads, time, width], keys and values [rows, kv heads, length, width]."""
    rows, heads, time, width = queries.shape
    ours = queries.dtype == keys.dtype == values.dtype == mx.float32 and sinks is None
    if not ours or hasattr(cache, "bits") or rows * heads * time * keys.shape[2] > _MOST_SCORES:
        return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    groups = keys.shape[1]
    grouped = (rows, groups, heads // groups, time)
    given = _spread(mask, time, keys.shape[2], groups)
    if time == 1:  # the heads of a group are the rows of one product: many products of one row are slow
        grouped = (rows, groups, 1, heads // groups)
        given = given.swapaxes(2, 3) if given is not None and given.ndim == 5 else given
    extra = [] if given is None else [given]
    output = _attend((queries * scale).reshape(*grouped, width), keys[:, :, None], values[:, :, None], *extra)
    return output.reshape(rows, heads, time, values.shape[-1])


def _spread(mask: Any, time: int, length: int, groups: int) -> mx.array | None:
    """The mask as an array that broadcasts against [rows, groups, heads of a group, time, length]."""
    if mask is None:
        return None
    if isinstance(mask, str):  # "causal", the queries being the last of the keys: the one mask of two axes
        return mx.arange(length - time, length)[:, None] >= mx.arange(length)
    mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    if mask.shape[1] == 1:
        return mask[:, :, None]
    return mask.reshape(mask.shape[0], groups, -1, *mask.shape[2:])


def _powers(q: mx.array, k: mx.array, mask: tuple[mx.array, ...]) -> mx.array:
    scores = q @ k.swapaxes(-1, -2)
    if mask and mask[0].dtype == mx.bool_:
        scores = mx.where(mask[0], scores, _HIDDEN)
    elif mask:
        scores = scores + mask[0]
    return shifted_exp(scores, scores.max(axis=-1, keepdims=True))


@mx.custom_function
def _attend_kept(
    q: mx.array, k: mx.array, v: mx.array, *mask: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    powers = _powers(q, k, mask)
    total = powers.sum(axis=-1, keepdims=True)
    return (powers @ v) / total, powers, total


@_attend_kept.vjp
def _attend_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
    (q, k, v, *mask), (output, powers, total) = primals, outputs
    c = cotangents[0] / total
    scores = powers * (c @ v.swapaxes(-1, -2) - (c * output).sum(axis=-1, keepdims=True))
    if mask and mask[0].dtype == mx.bool_ and mask[0].ndim > 2:  # a row that sees nothing moves no score
        scores = mx.where(mask[0], scores, 0.0)
    dq = scores @ k
    dk = (scores.swapaxes(-1, -2) @ q).sum(axis=2, keepdims=True)
    dv = (powers.swapaxes(-1, -2) @ c).sum(axis=2, keepdims=True)
    return dq, dk, dv, *[mx.zeros_like(m) for m in mask]


def _attend(q: mx.array, k: mx.array, v: mx.array, *mask: mx.array) -> mx.array:
    return _attend_kept(q, k, v, *mask)[0]  # type: ignore[index]


_REPLACED: dict[Any, Callable[..., mx.array]] = {
    activations.swiglu: swiglu,
    base.scaled_dot_product_attention: attention,
}


def rebind(model: nn.Module) -> None:
    """Let the model's layers call `swiglu` and `attention` of this module instead of mlx-lm's."""
    rebinding.rebind(model, _REPLACED)
