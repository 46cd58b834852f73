"""Biases of the base that train beside a low-rank adapter: PEFT's `bias`, none, lora_only or all."""

import copy
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import UnsupportedError
from mlx_adapters.methods.base import LINEARS, AdapterLayer

__all__ = ["BIASES", "BiasLayer", "bias_of", "biased", "shifted"]

BIASES = ("none", "lora_only", "all")
_ADDS = (*LINEARS, nn.LayerNorm, nn.GroupNorm, nn.Conv1d)


class BiasLayer(AdapterLayer):
    """A layer of the base with a bias of its own, and nothing else."""

    TENSORS: ClassVar[dict[str, str]] = {"bias": "bias"}
    TARGET: ClassVar[bool] = False

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.bias = bias_of(base)

    def __call__(self, x: mx.array) -> mx.array:
        return shifted(self.base(x), self.bias, self.base)

    def merge(self) -> nn.Module:
        """The layer with the trained bias."""
        merged = copy.copy(self.base)
        merged.bias = self.bias
        return merged


def bias_of(base: nn.Module) -> mx.array:
    """A copy of the bias of `base`, to be trained."""
    return mx.array(base.bias).astype(mx.float32)


def shifted(y: mx.array, bias: mx.array, base: nn.Module) -> mx.array:
    """`y`, what a layer with the bias of `base` returned, as if its bias were `bias`."""
    return y + (bias - base.bias).astype(y.dtype)


def biased(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have a bias of their own, by path. UnsupportedError for one that does something else
    with it than to add it."""
    found = {path: m for path, m in model.named_modules() if "bias" in m and m.bias.ndim == 1}
    for path, module in found.items():
        if not isinstance(module, _ADDS):
            raise UnsupportedError(
                f"bias='all': {path} is a {type(module).__name__}, whose bias may not simply be added"
            )
    return found
