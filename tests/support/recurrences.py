"""What the tests of recurrences in chunks share: an exact exponential, padding, and every gradient."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

__all__ = ["accurate_exp", "padded", "slopes"]

_exp = mx.exp


def accurate_exp(x: mx.array) -> mx.array:
    """MLX's exponential of float64 is right to 1e-6 only, its power to 1e-15."""
    return mx.power(mx.array(math.e, mx.float64), x) if x.dtype == mx.float64 else _exp(x)


def padded(time: int) -> mx.array:
    """The mask of two rows [2, time], one padded at its end and one at its start."""
    mask = np.ones((2, time), bool)
    mask[0, time - time // 3 :] = False
    mask[1, : time // 5] = False
    return mx.array(mask)


def slopes(function: Callable[..., Any], arrays: list[mx.array], mask: mx.array) -> list[mx.array]:
    """Outputs, last state, and the gradients of a sum that weighs each number of both differently."""

    def weighed(*arrays: mx.array) -> mx.array:
        total = mx.array(0.0, arrays[0].dtype)
        for number, result in enumerate(function(*arrays, mask)):
            weight = np.random.default_rng(number).standard_normal(result.shape)
            total = total + (result * mx.array(weight, dtype=result.dtype)).sum()
        return total

    return [*function(*arrays, mask), *mx.grad(weighed, argnums=tuple(range(len(arrays))))(*arrays)]
