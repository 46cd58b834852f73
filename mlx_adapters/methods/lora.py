"""LoRA: low-rank adaptation. Hu et al. 2021, https://arxiv.org/abs/2106.09685

    y = W x + scale * B A drop(x),    scale = alpha / rank

A [rank, in] starts kaiming-uniform(a = sqrt 5), B [out, rank] starts at zero: a fresh adapter is the base.
With `rslora`, scale = alpha / sqrt(rank) (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import AdapterError, ConfigError
from mlx_adapters.fields import field
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


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields of `--method lora`."""

    rank: int = field(8, "rank r of the update B A")
    alpha: float = field(16.0, "numerator of the scale alpha / rank")
    dropout: float = field(0.0, "dropout on the input of A while training")
    rslora: bool = field(False, "scale by alpha / sqrt(rank) instead")
    targets: str = field("default", "default, attn, mlp, attn+mlp, all-linear, names a,b or re:PATTERN")
    layers: str = field("all", "all, last:N or A-B (from 0, ends included)")

    def __post_init__(self) -> None:
        check(self.rank, self.alpha, self.dropout, "lora")

    @property
    def scale(self) -> float:
        """The factor in front of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def check(rank: int, alpha: float, dropout: float, method: str) -> None:
    """Raise ConfigError for values that no low-rank method can have."""
    if rank < 1:
        raise ConfigError(f"{method}: rank={rank} must be at least 1")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"{method}: alpha={alpha} must be a positive number")
    if not 0 <= dropout < 1:
        raise ConfigError(f"{method}: dropout={dropout} must be at least 0 and below 1")


class Layer(AdapterLayer):
    """`base(x) + scale * B A drop(x)`; x is [..., in], the result [..., out] in base's dtype."""

    TENSORS: ClassVar[dict[str, str]] = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}

    def __init__(self, base: nn.Module, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        in_dims, out_dims = dims(base)
        self.base = base
        self.scale = scale
        self.dropout = Dropout(dropout)
        bound = 1 / math.sqrt(in_dims)
        self.lora_a = mx.random.uniform(-bound, bound, (rank, in_dims))
        self.lora_b = mx.zeros((out_dims, rank))

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        # The narrow array [.., rank] is the cheap place to scale; the adapter computes in its own precision.
        low = (self.dropout(x) @ self.lora_a.T) * self.scale
        return y + (low @ self.lora_b.T).astype(y.dtype)

    def merge(self) -> nn.Module:
        """A plain linear layer with the weight W + scale * B A, in float32."""
        weight = plain_weight(self.base).astype(mx.float32)
        return linear_like(self.base, weight + self.scale * (self.lora_b @ self.lora_a))


def targets(model: nn.Module, model_type: str, config: Config) -> list[str]:
    """Paths of the linear layers to wrap."""
    return resolve_targets(model, model_type, targets=config.targets, layers=config.layers, default="lora")


def wrap(base: nn.Module, config: Config, site: Site) -> Layer:
    """The layer that takes the place of `base`."""
    return Layer(base, rank=config.rank, scale=config.scale, dropout=config.dropout)


def claims(fields: dict[str, Any]) -> bool:
    """Whether a LoRA configuration of PEFT is plain LoRA."""
    return not fields.get("use_dora")


def to_peft(config: Config) -> dict[str, Any]:
    """PEFT's fields for this configuration."""
    return peft_fields(config)


def peft_fields(config: Any) -> dict[str, Any]:
    """What LoRA and DoRA share; only what every PEFT since 0.4 knows, more only where needed."""
    fields: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    if config.rslora:
        fields["use_rslora"] = True
    return fields


# PEFT fields that change the function and are not supported yet, with the values that leave it alone.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None, []),
}


def from_peft(fields: dict[str, Any]) -> Config:
    """The configuration a PEFT `adapter_config.json` describes; AdapterError names what is not supported."""
    return Config(**read_peft(fields))


def read_peft(fields: dict[str, Any]) -> dict[str, Any]:
    """The values of PEFT's fields that LoRA and DoRA share."""
    for name, neutral in _NEUTRAL.items():
        if name in fields and fields[name] not in neutral:
            raise AdapterError(
                f"{name}={fields[name]!r} is not supported yet: only plain LoRA and rsLoRA load here"
            )
    if isinstance(init := fields.get("init_lora_weights"), str) and init.lower() in (
        "pissa",
        "olora",
        "corda",
        "loftq",
    ):
        raise AdapterError(
            f"init_lora_weights={init!r} changes the base's weights: save it in PEFT as plain LoRA first"
        )
    missing = [name for name in ("r", "lora_alpha") if name not in fields]
    if missing:
        raise AdapterError(f"{' and '.join(missing)} missing: not a PEFT LoRA configuration")
    chosen = fields.get("target_modules")
    return {
        "rank": fields["r"],
        "alpha": float(fields["lora_alpha"]),
        "dropout": float(fields.get("lora_dropout") or 0.0),
        "rslora": bool(fields.get("use_rslora", False)),
        "targets": ",".join(sorted(chosen)) if isinstance(chosen, list) and chosen else "default",
    }
