"""Short convolutions of one channel each, as sums of shifted rows.

    y_t = sum of w_j x_(t+j), 0 <= j < K;   dx_t = sum of w_j dy_(t-j),   dw_j = sum over t of dy_t x_(t+j)

State-space, linear-attention and convolution blocks have them, with K of 3 or 4. MLX's convolution gives each
channel a matrix product of its own on a CPU, and took a fifth of a linear-attention layer's training step.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

__all__ = ["ShortConv1d", "is_short"]

_LONGEST = 8


def is_short(module: nn.Module) -> bool:
    """Whether `module` is MLX's convolution, of one channel each and a few tokens without padding."""
    if type(module) is not nn.Conv1d:
        return False
    channels, taps, inputs = module.weight.shape
    plain = (module.stride, module.padding, module.dilation) == (1, 0, 1)
    return plain and inputs == 1 and module.groups == channels and taps <= _LONGEST


class ShortConv1d(nn.Conv1d):
    """`nn.Conv1d` where `is_short` holds."""

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = _convolved(x, self.weight[..., 0].T)  # type: ignore[assignment]
        return y + self.bias if "bias" in self else y


def _shifted_sum(x: mx.array, weight: mx.array) -> mx.array:
    """x [rows, time + K - 1, channels], weight [K, channels] -> [rows, time, channels]."""
    taps = weight.shape[0]
    time = x.shape[1] - taps + 1
    y = x[:, :time] * weight[0]
    for number in range(1, taps):
        y = y + x[:, number : number + time] * weight[number]
    return y


@mx.custom_function
def _convolved(x: mx.array, weight: mx.array) -> mx.array:
    return _shifted_sum(x, weight)


@_convolved.vjp
def _convolved_vjp(primals: Any, cotangent: mx.array, output: Any) -> tuple[mx.array, mx.array]:
    x, weight = primals
    taps, time = weight.shape[0], cotangent.shape[1]
    wide = mx.pad(cotangent, [(0, 0), (taps - 1, taps - 1), (0, 0)])
    moved = [(cotangent * x[:, number : number + time]).sum(axis=(0, 1)) for number in range(taps)]
    return _shifted_sum(wide, weight[::-1]), mx.stack(moved)
