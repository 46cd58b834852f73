"""LN tuning: the weights (and biases) of the norms. Zhao et al. 2023, https://arxiv.org/abs/2312.11420

    y = norm(x) with its own weight and bias

The base's norms stay as they are; copies of them train and are saved.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import ConfigError
from mlx_adapters.fields import field
from mlx_adapters.methods.base import AdapterLayer, peft_targets
from mlx_adapters.methods.peft_fields import COMMON
from mlx_adapters.models import sites

PEFT_TYPE = "LN_TUNING"
PEFT_FIELDS = COMMON


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields of `--method ln_tuning`."""

    targets: str = field("all", "all norms of the blocks and the last one, or names a,b")


class Layer(AdapterLayer):
    """A norm with weights of its own."""

    TENSORS: ClassVar[dict[str, str]] = {
        "weight": "ln_tuning_layers.weight",
        "bias": "ln_tuning_layers.bias",
    }

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.own = copy.deepcopy(base)
        self.own.unfreeze()
        self.own.update({name: mx.array(value).astype(mx.float32) for name, value in self.tensors().items()})

    def __call__(self, x: mx.array) -> mx.array:
        return self.own(x).astype(x.dtype)

    def tensors(self) -> dict[str, mx.array]:
        return {name: self.own[name] for name in self.TENSORS if name in self.own}

    def fill(self, arrays: dict[str, mx.array]) -> None:
        self.own.update(arrays)

    def merge(self) -> nn.Module:
        """The norm with the trained weights."""
        return self.own


def place(model: nn.Module, model_type: str, config: Config, paths: list[str] | None) -> dict[str, nn.Module]:
    """A copy in the place of each chosen norm."""
    modules = dict(model.named_modules())
    norms = [p for p, m in modules.items() if "weight" in m and "norm" in type(m).__name__.lower()]
    if paths is None and config.targets == "all":
        paths = norms
    elif paths is None:
        names = [name.strip() for name in config.targets.split(",")]
        paths = [path for path in norms if any(sites.matches(path, name) for name in names)]
    if not paths:
        known = sorted({path.rpartition(".")[2] for path in norms})
        raise ConfigError(f"ln_tuning: targets {config.targets!r} match no norm. Known: {', '.join(known)}")
    return {path: Layer(modules[path]) for path in paths}


def to_peft(config: Config) -> dict[str, Any]:
    """PEFT's fields for this configuration."""
    return {"modules_to_save": None}


def from_peft(fields: dict[str, Any]) -> Config:
    """The configuration a PEFT `adapter_config.json` describes."""
    return Config(targets=peft_targets(fields, otherwise="all"))
