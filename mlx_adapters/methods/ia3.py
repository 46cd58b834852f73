"""IA3's layer and its options."""

import re
from typing import ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import ConfigError
from mlx_adapters.fields import field
from mlx_adapters.methods.base import (
    LAYERS_HELP,
    TARGETS_HELP,
    AdapterLayer,
    Layers,
    Site,
    dims,
    linear_like,
    peft_targets,
    plain_weight,
    resolve_targets,
    short_names,
)
from mlx_adapters.methods.beside import WHOLE, WithModules
from mlx_adapters.methods.peft_fields import COMMON, Fields
from mlx_adapters.models import sites


class Layer(AdapterLayer):
    """A linear layer whose output (`feedforward`: input) is scaled, element by element."""

    TENSORS: ClassVar[dict[str, str]] = {"ia3_l": "ia3_l"}

    def __init__(self, base: nn.Module, *, feedforward: bool) -> None:
        super().__init__()
        in_dims, out_dims = dims(base)
        self.base = base
        # PEFT's shapes: they tell the two kinds apart in a file
        self.ia3_l = mx.ones((1, in_dims) if feedforward else (out_dims, 1))

    @property
    def feedforward(self) -> bool:
        """Whether the input is scaled."""
        return self.ia3_l.shape[0] == 1 and self.ia3_l.shape[1] == dims(self.base)[0]

    def __call__(self, x: mx.array) -> mx.array:
        if self.feedforward:
            return self.base((x * self.ia3_l[0]).astype(x.dtype))
        y = self.base(x)
        return (y * self.ia3_l[:, 0]).astype(y.dtype)

    def merge(self) -> nn.Module:
        """A plain linear layer with the scaled weight (and bias, where the output is scaled)."""
        weight = plain_weight(self.base).astype(mx.float32) * self.ia3_l
        if self.feedforward or "bias" not in self.base:
            return linear_like(self.base, weight)
        return linear_like(self.base, weight, self.base.bias * self.ia3_l[:, 0])


class IA3(WithModules):
    """IA3: infused adapter by inhibiting and amplifying inner activations. Liu et al. 2022,
    https://arxiv.org/abs/2205.05638

        y = l * (W x + b)     on attention's layers: l [out] scales the output (keys and values)
        y = W (l * x) + b     on the layer out of the MLP: l [in] scales its input

    l starts at one: a fresh adapter is the base.
    """

    NAME = "ia3"
    TITLE = "IA3: infused adapter by inhibiting and amplifying inner activations"
    AUTHORS = "Liu et al. 2022"
    PAPER = "https://arxiv.org/abs/2205.05638"
    PEFT_TYPE = "IA3"
    PEFT_FIELDS = {
        **COMMON,
        **dict.fromkeys(("feedforward_modules", "init_ia3_weights", "modules_to_save")),
    }
    LAYERS = (Layer, *WHOLE)

    targets: str = field("default", TARGETS_HELP)
    feedforward: str = field(
        "default", "names a,b (or re:PATTERN) of targets whose input is scaled; default: out of the MLP"
    )
    layers: str = field("all", LAYERS_HELP)

    def __post_init__(self) -> None:
        try:
            re.compile(self.feedforward.removeprefix("re:"))
        except re.error as error:
            raise ConfigError(f"ia3: feedforward={self.feedforward!r}: {error}") from None

    def select(self, model: nn.Module, model_type: str) -> list[str]:
        return resolve_targets(model, model_type, targets=self.targets, layers=self.layers, default="ia3")

    def wrap(self, base: nn.Module, site: Site) -> Layer:
        if self.feedforward == "default":
            return Layer(base, feedforward=site.role == "mlp" and site.side == "post")
        path = sites.to_hf(site.path, site.model_type)
        if self.feedforward.startswith("re:"):
            return Layer(base, feedforward=bool(re.fullmatch(self.feedforward[3:], path)))
        names = [name.strip() for name in self.feedforward.split(",") if name.strip()]
        return Layer(base, feedforward=any(sites.matches(path, name) for name in names))

    def to_peft(self) -> Fields:
        return {"fan_in_fan_out": False, **self.modules_field()}

    def peft_extra(self, layers: Layers, model: nn.Module, model_type: str) -> Fields:
        """The layers whose input is scaled, named as the targets are: whole paths where a last part of them
        would name layers of both kinds."""
        scaled = {path for path, layer in layers.items() if isinstance(layer, Layer) and layer.feedforward}
        own = {path for path, layer in layers.items() if layer.TARGET}
        names = short_names(own, model, model_type)
        if {names[path] for path in scaled} & {names[path] for path in own - scaled}:
            names = {path: sites.to_hf(path, model_type) for path in own}
        return {
            "target_modules": sorted(set(names.values())),
            "feedforward_modules": sorted({names[path] for path in scaled}),
        }

    @classmethod
    def from_peft(cls, fields: Fields) -> Self:
        scaled = fields.get("feedforward_modules")
        if isinstance(scaled, str):
            feedforward = f"re:{scaled}"
        else:
            # an empty list is none at all, where our default would be those out of the MLP
            feedforward = "default" if scaled is None else ",".join(sorted(scaled))
        return cls(targets=peft_targets(fields), feedforward=feedforward, **cls.read_modules(fields))
