"""Bottleneck adapters one after the other with linear layers."""

import mlx.nn as nn

from mlx_adapters.errors import ConfigError, unknown
from mlx_adapters.fields import field
from mlx_adapters.methods.base import Site, resolve_targets
from mlx_adapters.methods.bottleneck import Layer, LinearBottleneck
from mlx_adapters.methods.peft_fields import Fields

SIDES, VARIANTS = ("auto", "pre", "post"), ("H", "P")


class Series(LinearBottleneck):
    """Series: bottleneck adapters one after the other with linear layers. Hu et al. 2023 (LLM-Adapters),
    https://arxiv.org/abs/2304.01933, after Houlsby et al. 2019 (AdapterH) and Pfeiffer et al. 2020 (AdapterP)

        pre:  y = W (x + f(x))         on a layer into the MLP or attention
        post: z = W x,  y = z + f(z)   on the layer out of it
        f(x) = scaling * up(act(down(drop(x)))), without biases

    Variant H stands on every linear layer of the MLP, variant P on its last one. The folder is LLM-Adapters'
    (peft_type BOTTLENECK); no PEFT release has the method.
    """

    NAME = "series"
    TITLE = "Series: bottleneck adapters one after the other with linear layers"
    AUTHORS = "Hu et al. 2023"
    PAPER = "https://arxiv.org/abs/2304.01933"

    variant: str = field("H", "which targets by default: H, the MLP's linear layers; P, its last one")
    side: str = field("auto", "pre, post, or auto: by the layer's role")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ConfigError("series: " + unknown("variant", self.variant, VARIANTS))
        if self.side not in SIDES:
            raise ConfigError("series: " + unknown("side", self.side, SIDES))

    def select(self, model: nn.Module, model_type: str) -> list[str]:
        default = "series_p" if self.variant == "P" else "series"
        return resolve_targets(model, model_type, targets=self.targets, layers=self.layers, default=default)

    def wrap(self, base: nn.Module, site: Site) -> Layer:
        return self.layer(base, site.side if self.side == "auto" else self.side)

    @classmethod
    def claims(cls, fields: Fields) -> bool:
        """Whether a BOTTLENECK configuration is a series adapter."""
        return not fields.get("use_parallel_adapter")

    def to_peft(self) -> Fields:
        """LLM-Adapters' fields, and the side where it cannot express it."""
        return {
            **super().to_peft(),
            "use_parallel_adapter": False,
            "use_adapterp": self.variant == "P",
            **({} if self.side == "auto" else {"side": self.side}),
        }

    @classmethod
    def options_in(cls, fields: Fields) -> Fields:
        variant = "P" if fields.get("use_adapterp") else "H"
        return super().options_in(fields) | {"variant": variant, "side": fields.get("side", "auto")}
