"""Parallel: bottleneck adapters beside linear layers. He et al. 2021, https://arxiv.org/abs/2110.04366;
per linear layer as in Hu et al. 2023 (LLM-Adapters), https://arxiv.org/abs/2304.01933

    y = W x + f(x),    f(x) = scaling * up(act(down(drop(x)))), without biases

With `scaling=learned` one scalar per layer is trained: the scaled parallel adapter. The folder is
LLM-Adapters' (peft_type BOTTLENECK); no PEFT release has the method.
"""

from dataclasses import dataclass
from typing import Any, cast

import mlx.nn as nn

from mlx_adapters.fields import field
from mlx_adapters.methods import bottleneck
from mlx_adapters.methods.base import AdapterLayer, Site, resolve_targets

PEFT_TYPE = "BOTTLENECK"
IN_PEFT = False
Layer = bottleneck.Layer


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields of `--method parallel`."""

    bottleneck_size: int = field(256, "width of the bottleneck")
    non_linearity: str = field("tanh", "one of transformers' activation names: tanh, relu, gelu, silu ...")
    scaling: float | str = field(1.0, "factor s in front of the bottleneck, or learned")
    dropout: float = field(0.0, "dropout on the bottleneck's input while training")
    init: str = field("mam_adapter", bottleneck.INIT_HELP)
    targets: str = field("default", "default, attn, mlp, attn+mlp, all-linear, names a,b or re:PATTERN")
    layers: str = field("all", "all, last:N or A-B (from 0, ends included)")

    def __post_init__(self) -> None:
        bottleneck.check("parallel", self)


def targets(model: nn.Module, model_type: str, config: Config) -> list[str]:
    """Paths of the linear layers to wrap."""
    return resolve_targets(
        model, model_type, targets=config.targets, layers=config.layers, default="parallel"
    )


def wrap(base: nn.Module, config: Config, site: Site) -> AdapterLayer:
    """The layer that takes the place of `base`."""
    return bottleneck.on_linear(base, config, "parallel")


def claims(fields: dict[str, Any]) -> bool:
    """Whether a BOTTLENECK configuration is a parallel adapter."""
    return bool(fields.get("use_parallel_adapter"))


def to_peft(config: Config) -> dict[str, Any]:
    """LLM-Adapters' fields for this configuration."""
    return {**bottleneck.fields_of(config), "use_parallel_adapter": True, "use_adapterp": False}


def from_peft(fields: dict[str, Any]) -> Config:
    """The configuration an `adapter_config.json` of LLM-Adapters describes."""
    values = bottleneck.read_fields(fields)
    return cast(Config, bottleneck.config_of(Config, values, "parallel"))
