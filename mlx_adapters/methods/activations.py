"""The activations of bottlenecks, by the names that transformers gives them."""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

__all__ = ["ACTIVATIONS"]

Activation = Callable[[mx.array], mx.array]

# The names of transformers' ACT2FN that have no parameters of their own.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": nn.gelu,
    "gelu_10": lambda x: mx.clip(nn.gelu(x), -10, 10),
    "gelu_accurate": nn.gelu_approx,
    "gelu_fast": nn.gelu_approx,
    "gelu_new": nn.gelu_approx,
    "gelu_python": nn.gelu,
    "gelu_python_tanh": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "hardswish": nn.hardswish,
    "laplace": lambda x: 0.5 * (1 + mx.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": nn.leaky_relu,
    "linear": lambda x: x,
    "mish": nn.mish,
    "quick_gelu": nn.gelu_fast_approx,
    "relu": nn.relu,
    "relu2": nn.relu2,
    "relu6": nn.relu6,
    "sigmoid": mx.sigmoid,
    "silu": nn.silu,
    "sqrtsoftplus": lambda x: mx.sqrt(nn.softplus(x)),
    "swish": nn.silu,
    "tanh": mx.tanh,
}
