"""Quantized layers for the CPU: the weight is written out in floating point where enough rows share it.

    y = x W^T,  dx = dy W,  W = dequantize(packed)

The gradient dequantizes again instead of keeping the float copy of every layer alive from the forward to the
backward pass: the memory of a step stays that of the packed weights. Gradients flow to x only; the packed
weights of a base are frozen.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

__all__ = ["FEW_ROWS", "QuantizedEmbedding", "QuantizedLinear", "dequantize", "dequantized_matmul"]

# Below this many rows the native product wins over writing the weight out: measured on two x86 cores with
# 4-bit 1024 x 1024 weights, where one row costs 0.9 ms natively and writing the weight out 2-3 ms.
FEW_ROWS = 4
_SHIFTS = {2: (0, 2, 4, 6), 4: (0, 4), 8: (0,)}  # where the values of a byte stand, by their width


def dequantize(layer: Any, *, after: mx.array | None = None) -> mx.array:
    """The weight [out, in] of a quantized linear layer or embedding, in float32.

    It depends on nothing but constants, so MLX would write out many layers at once, ahead of their use: all
    sixteen of a stack of sixteen were alive together. `after` makes it wait for the array it is used with.
    """
    weight = layer.weight if after is None else mx.depends([layer.weight], [after])[0]
    if layer.mode == "affine" and layer.bits in _SHIFTS:
        return _affine(weight, layer)
    return mx.dequantize(
        weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=mx.float32,
    )


def _affine(packed: mx.array, layer: Any) -> mx.array:
    """mx.dequantize for the widths that fill a byte, bit for bit and in half its time, on whole arrays."""
    octets = packed.view(mx.uint8)
    mask = (1 << layer.bits) - 1
    parts = [octets >> shift & mask for shift in _SHIFTS[layer.bits]] if layer.bits < 8 else [octets]
    values = mx.stack(parts, axis=-1) if len(parts) > 1 else octets
    groups = values.astype(mx.float32).reshape(*layer.scales.shape, layer.group_size)
    written = groups * layer.scales[..., None] + layer.biases[..., None]
    return written.astype(mx.float32).flatten(-2)


def dequantized_matmul(layer: Any, x: mx.array) -> mx.array:
    """x @ W.T through the written-out weight; x is [..., in]."""

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return x @ dequantize(layer, after=x).T

    @product.vjp
    def gradient(primals: Any, cotangent: mx.array, output: Any) -> mx.array:
        return cotangent @ dequantize(layer, after=cotangent)

    y: mx.array = product(x)  # type: ignore[assignment]
    return y


def _few(x: mx.array) -> bool:
    return x.size // x.shape[-1] < FEW_ROWS


class QuantizedLinear(nn.QuantizedLinear):
    """nn.QuantizedLinear, computed by GEMM where enough rows share the weight."""

    def __call__(self, x: mx.array) -> mx.array:
        if _few(x) or x.dtype != mx.float32:
            return super().__call__(x)
        y = dequantized_matmul(self, x)
        return y + self.bias if "bias" in self else y


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """nn.QuantizedEmbedding whose use as an output head is computed by GEMM."""

    def as_linear(self, x: mx.array) -> mx.array:
        if _few(x) or x.dtype != mx.float32:
            return super().as_linear(x)
        return dequantized_matmul(self, x)
