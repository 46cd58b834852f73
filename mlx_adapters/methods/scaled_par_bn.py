"""The parallel adapter beside the MLP, with a learned scale. He et al. 2021,
https://arxiv.org/abs/2110.04366

    y = h + s + f(h),    f(x) = scaling * (up(act(down(x) + bias)) + bias)

It stands beside the MLP of a block. `h` is the residual stream
before the sublayer's norm, `s` what the sublayer returns; the formula and its place are AdapterHub's
(`adapters` 1.3), whose library opens the export.
"""

from dataclasses import dataclass
from typing import Any, cast

import mlx.nn as nn

from mlx_adapters.fields import field
from mlx_adapters.methods import bottleneck

PEFT_TYPE = "ADAPTERHUB"
IN_PEFT = False
Layer = bottleneck.BlockLayer


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields of `--method scaled_par_bn`."""

    reduction_factor: float = field(2.0, "the model's width divided by the bottleneck's")
    bottleneck_size: int | None = field(None, "width of the bottleneck; overrides the reduction factor")
    non_linearity: str = field("relu", "one of transformers' activation names: relu, swish, gelu ...")
    scaling: float | str = field("learned", "factor in front of the bottleneck, or learned")
    dropout: float = field(0.0, "dropout on the bottleneck's output while training")
    init: str = field("mam_adapter", "mam_adapter: a fresh adapter is the base; bert: it is not")
    layers: str = field("all", "all, last:N or A-B (from 0, ends included)")

    def __post_init__(self) -> None:
        bottleneck.check(
            "scaled_par_bn",
            size=self.bottleneck_size,
            factor=self.reduction_factor,
            non_linearity=self.non_linearity,
            dropout=self.dropout,
            scaling=self.scaling,
            init=self.init,
        )

    def size(self, width: int) -> int:
        """The bottleneck of a model of `width`."""
        return self.bottleneck_size or max(1, int(width // self.reduction_factor))


def place(model: nn.Module, model_type: str, config: Config, paths: list[str] | None) -> dict[str, nn.Module]:
    """What stands where: the adapter behind the sublayer's last linear layer, and what it reads h from."""
    return bottleneck.place_blocks(
        model,
        model_type,
        paths,
        method="scaled_par_bn",
        kind="par",
        layers=config.layers,
        size=config.size,
        non_linearity=config.non_linearity,
        scaling=config.scaling,
        dropout=config.dropout,
        init=config.init,
    )


def claims(fields: dict[str, Any]) -> bool:
    """Whether the folder holds this form."""
    return fields.get("adapter") == "scaled_par_bn"


def to_peft(config: Config) -> dict[str, Any]:
    """What `adapter_config.json` says."""
    return {"adapter": "scaled_par_bn", **bottleneck.block_fields(config)}


def from_peft(fields: dict[str, Any]) -> Config:
    """The configuration of a saved folder."""
    values = bottleneck.read_block_fields(fields)
    return cast(Config, bottleneck.config_of(Config, values, "scaled_par_bn"))
