"""DoRA: weight-decomposed low-rank adaptation. Liu et al. 2024, https://arxiv.org/abs/2402.09353

    y = m * (V / ||V||) x,    V = W + scale * B A,    scale = alpha / rank

m [out] holds the length of each row, ||V|| is taken row by row and is a constant in the gradient (section 4.3
of the paper). m starts at ||W|| and B at zero: a fresh adapter is the base. V is never formed:

    y = W x + (g - 1) W x + g * scale * B A x,    g = m / ||V||
    ||V||^2 = ||W||^2 + 2 scale (W A^T * B) + scale^2 (B A A^T * B),    summed over each row

and W A^T is the base layer applied to the rows of A, so a quantized W is not written out for it.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.fields import field
from mlx_adapters.methods import lora
from mlx_adapters.methods.base import (
    AdapterLayer,
    Dropout,
    Site,
    dims,
    linear_like,
    plain_weight,
    resolve_targets,
)

PEFT_TYPE = "LORA"
PEFT_FIELDS = {**lora.SHARED_FIELDS, "use_dora": (True,)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields of `--method dora`."""

    rank: int = field(8, "rank r of the update B A")
    alpha: float = field(16.0, "numerator of the scale alpha / rank")
    dropout: float = field(0.0, "dropout on the input of the update while training")
    rslora: bool = field(False, "scale by alpha / sqrt(rank) instead")
    targets: str = field("default", "default, attn, mlp, attn+mlp, all-linear, names a,b or re:PATTERN")
    layers: str = field("all", "all, last:N or A-B (from 0, ends included)")

    def __post_init__(self) -> None:
        lora.check(self.rank, self.alpha, self.dropout, "dora")

    @property
    def scale(self) -> float:
        """The factor in front of B A."""
        return lora.scale_of(self.alpha, self.rank, self.rslora)


class Layer(AdapterLayer):
    """A linear layer whose rows have a learned direction and length; x is [.., in], the result [.., out]."""

    # transformers reads only the form with .weight; PEFT writes the one without
    TENSORS: ClassVar[dict[str, str]] = {
        "lora_a": "lora_A.weight",
        "lora_b": "lora_B.weight",
        "magnitude": "lora_magnitude_vector.weight",
    }
    ALIASES: ClassVar[dict[str, str]] = {"magnitude": "lora_magnitude_vector"}
    READS_WEIGHT: ClassVar[bool] = True

    def __init__(self, base: nn.Module, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        in_dims, out_dims = dims(base)
        self.base = base
        self.scale = scale
        self.dropout = Dropout(dropout)
        bound = 1 / math.sqrt(in_dims)
        self.lora_a = mx.random.uniform(-bound, bound, (rank, in_dims))
        self.lora_b = mx.zeros((out_dims, rank))
        # a leading underscore keeps it out of the parameters: it follows from the base
        self._rows = plain_weight(base).astype(mx.float32).square().sum(axis=1)
        self.magnitude = mx.sqrt(self._rows)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        dropped = self.dropout(x)
        # as in PEFT the update sees the dropped input, and with it the base's share of the correction
        plain = y if dropped is x else self.base(dropped)
        if "bias" in self.base:
            plain = plain - self.base.bias
        gain = self.magnitude / mx.stop_gradient(self._norm())
        low = (dropped @ self.lora_a.T) * self.scale
        return y + ((gain - 1) * plain + gain * (low @ self.lora_b.T)).astype(y.dtype)

    def _norm(self) -> mx.array:
        """||W + scale * B A|| of each row, [out]."""
        a, b = self.lora_a, self.lora_b
        product = self.base(a)  # A W^T, [rank, out]
        if "bias" in self.base:
            product = product - self.base.bias
        cross = (product.astype(mx.float32).T * b).sum(axis=1)
        update = ((b @ (a @ a.T)) * b).sum(axis=1)
        return mx.sqrt(self._rows + 2 * self.scale * cross + self.scale**2 * update)

    def merge(self) -> nn.Module:
        """A plain linear layer with the weight m * V / ||V||, in float32."""
        v = plain_weight(self.base).astype(mx.float32) + self.scale * (self.lora_b @ self.lora_a)
        return linear_like(self.base, (self.magnitude / mx.linalg.norm(v, axis=1))[:, None] * v)


def targets(model: nn.Module, model_type: str, config: Config) -> list[str]:
    """Paths of the linear layers to wrap."""
    return resolve_targets(model, model_type, targets=config.targets, layers=config.layers, default="lora")


def wrap(base: nn.Module, config: Config, site: Site) -> Layer:
    """The layer that takes the place of `base`."""
    return Layer(base, rank=config.rank, scale=config.scale, dropout=config.dropout)


def claims(fields: dict[str, Any]) -> bool:
    """Whether a LoRA configuration of PEFT is DoRA."""
    return bool(fields.get("use_dora"))


def to_peft(config: Config) -> dict[str, Any]:
    """PEFT's fields for this configuration."""
    return {**lora.peft_fields(config), "use_dora": True}


def from_peft(fields: dict[str, Any]) -> Config:
    """The configuration a PEFT `adapter_config.json` describes; AdapterError names what is not supported."""
    return Config(**lora.read_peft(fields))
