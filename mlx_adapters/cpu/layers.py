"""Layers of a loaded model in the form that a CPU computes fastest."""

import mlx.nn as nn

from mlx_adapters import device
from mlx_adapters.cpu import convolution, exponential, quantized
from mlx_adapters.cpu.kernels import own_kernels

__all__ = ["speed_up"]


def speed_up(model: nn.Module) -> None:
    """On CPU, let quantized layers with many rows compute as dequantize + float GEMM, SwiGLU take a
    faster exponential, and short convolutions of one channel each add up shifted rows.

    MLX's quantized product does not use BLAS: it is up to fifty times slower there. Metal keeps the native
    kernels. Arrays, names and `isinstance(layer, nn.QuantizedLinear)` stay as they are.
    """
    if not device.on_cpu():
        return
    import mlx.nn as nn

    own_kernels()

    exponential.rebind(model)
    for module in model.modules():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = quantized.QuantizedLinear
        elif type(module) is nn.QuantizedEmbedding:
            module.__class__ = quantized.QuantizedEmbedding
        elif convolution.is_short(module):
            module.__class__ = convolution.ShortConv1d
