"""A faster exponential for the CPU, and SwiGLU made of it.

MLX's exponential is scalar code on x86 and took a quarter of a training step. This one is Cephes' (Moshier):
a few products and sums, which MLX computes in vectors, and in a few passes where a C++ compiler is there for
`mx.compile` (it falls back by itself).

    e^x = 2^k e^r,  k = round(x / ln 2),  |r| <= ln 2 / 2

SwiGLU has a gradient of its own that computes again what is cheap instead of keeping it:

    swiglu(g, u) = g s u,  s = 1 / (1 + e^-g);   dg = dy u (s + g s (1 - s)),  du = dy g s

All of it is for float32; other types take MLX's way.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations

from mlx_adapters import device
from mlx_adapters import rebind as rebinding
from mlx_adapters.cpu.fused import fused

__all__ = ["exp", "exp2", "rebind", "shifted_exp", "swiglu"]

# At and below the lower bound 2^k is 0: what a mask has hidden gets no weight at all. Above the upper one the
# result would not be finite.
_LOW, _HIGH = -88.0, 88.0
_ROUND = 12582912.0  # 1.5 * 2^23: a float32 that is added to it is rounded to a whole number
_LN2 = (0.693359375, -2.12194440e-4)  # ln 2 in two parts, the first one exact
_SERIES = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_ROUND_BITS = 0x4B400000  # of _ROUND
_SERIES2 = (1.0000000749813821, 0.69314697, 0.2402212, 0.05550713, 0.00967555, 0.00132765)


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


def exp2(x: mx.array, factor: mx.array | None = None) -> mx.array:
    """2^x for float32 up to 127, relative error below 3e-7, times `factor`; 0 at and below -127, NaN for NaN.

    `mx.compile` makes one pass of it: it puts about eleven operations in a row into one.
    """
    if not device.on_cpu():
        power = mx.exp(x * math.log(2))
        return power if factor is None else power * factor
    shifted = x + _ROUND
    rest = x - (shifted - _ROUND)
    square = rest * rest
    c = _SERIES2
    low, middle, high = c[0] + c[1] * rest, c[2] + c[3] * rest, c[4] + c[5] * rest
    series = (low + square * middle) + (square * square) * high
    whole = mx.maximum(shifted.view(mx.int32), _ROUND_BITS - 127)
    power = ((whole << 23) + (127 << 23)).view(mx.float32)
    return series * (power if factor is None else power * factor)


@fused
def shifted_exp(x: mx.array, most: mx.array) -> mx.array:
    """e^(x - most) for float32."""
    return exp(x - most)


@fused
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * up / (1.0 + exp(-gate))


@fused
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


_REPLACED: dict[Any, Callable[..., mx.array]] = {
    activations.swiglu: swiglu,
}


def rebind(model: nn.Module) -> None:
    """Let the model's layers call `swiglu` of this module instead of mlx-lm's."""
    rebinding.rebind(model, _REPLACED)
