"""Series: bottleneck adapters one after the other with linear layers. Hu et al. 2023 (LLM-Adapters),
https://arxiv.org/abs/2304.01933, after Houlsby et al. 2019 (AdapterH) and Pfeiffer et al. 2020 (AdapterP)

    pre:  y = W (x + f(x))         on a layer into the MLP or attention
    post: z = W x,  y = z + f(z)   on the layer out of it
    f(x) = scaling * up(act(down(drop(x)))), without biases

Variant H stands on every linear layer of the MLP, variant P on its last one. The folder is LLM-Adapters'
(peft_type BOTTLENECK); no PEFT release has the method.
"""

from dataclasses import dataclass
from typing import Any, cast

import mlx.nn as nn

from mlx_adapters.errors import ConfigError, unknown
from mlx_adapters.fields import field
from mlx_adapters.methods import bottleneck
from mlx_adapters.methods.base import AdapterLayer, Site, resolve_targets

PEFT_TYPE = "BOTTLENECK"
IN_PEFT = False
Layer = bottleneck.Layer

SIDES, VARIANTS = ("auto", "pre", "post"), ("H", "P")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields of `--method series`."""

    bottleneck_size: int = field(256, "width of the bottleneck")
    non_linearity: str = field("tanh", "one of transformers' activation names: tanh, relu, gelu, silu ...")
    scaling: float | str = field(1.0, "factor s in front of the bottleneck, or learned")
    dropout: float = field(0.0, "dropout on the bottleneck's input while training")
    init: str = field("mam_adapter", bottleneck.INIT_HELP)
    variant: str = field("H", "which targets by default: H, the MLP's linear layers; P, its last one")
    side: str = field("auto", "pre, post, or auto: by the layer's role")
    targets: str = field("default", "default, attn, mlp, attn+mlp, all-linear, names a,b or re:PATTERN")
    layers: str = field("all", "all, last:N or A-B (from 0, ends included)")

    def __post_init__(self) -> None:
        bottleneck.check("series", self)
        if self.variant not in VARIANTS:
            raise ConfigError("series: " + unknown("variant", self.variant, VARIANTS))
        if self.side not in SIDES:
            raise ConfigError("series: " + unknown("side", self.side, SIDES))


def targets(model: nn.Module, model_type: str, config: Config) -> list[str]:
    """Paths of the linear layers to wrap."""
    default = "series_p" if config.variant == "P" else "series"
    return resolve_targets(model, model_type, targets=config.targets, layers=config.layers, default=default)


def wrap(base: nn.Module, config: Config, site: Site) -> AdapterLayer:
    """The layer that takes the place of `base`."""
    return bottleneck.on_linear(base, config, site.side if config.side == "auto" else config.side)


def claims(fields: dict[str, Any]) -> bool:
    """Whether a BOTTLENECK configuration is a series adapter."""
    return not fields.get("use_parallel_adapter")


def to_peft(config: Config) -> dict[str, Any]:
    """LLM-Adapters' fields for this configuration; a side that it cannot express is said besides."""
    said = {} if config.side == "auto" else {"side": config.side}
    return {
        **bottleneck.fields_of(config),
        "use_parallel_adapter": False,
        "use_adapterp": config.variant == "P",
        **said,
    }


def from_peft(fields: dict[str, Any]) -> Config:
    """The configuration an `adapter_config.json` of LLM-Adapters describes."""
    values = bottleneck.read_fields(fields)
    values |= {"variant": "P" if fields.get("use_adapterp") else "H", "side": fields.get("side", "auto")}
    return cast(Config, bottleneck.config_of(Config, values, "series"))
