"""The parallel adapter beside the MLP, with a learned scale. He et al. 2021,
https://arxiv.org/abs/2110.04366

    y = h + s + f(h),    f(x) = scaling * (up(act(down(x) + bias)) + bias)

It stands beside the MLP of a block. `h` is the residual stream
before the sublayer's norm, `s` what the sublayer returns; the formula and its place are AdapterHub's
(`adapters` 1.3), whose library opens the export.
"""

from dataclasses import dataclass
from typing import Any, cast

from mlx_adapters.fields import field
from mlx_adapters.methods import bottleneck

PEFT_TYPE = "ADAPTERHUB"
IN_PEFT = False
Layer = bottleneck.BlockLayer
place = bottleneck.place_blocks
to_peft = bottleneck.block_fields


@dataclass(frozen=True, kw_only=True)
class Config(bottleneck.BlockConfig):
    """Fields of `--method scaled_par_bn`."""

    METHOD = "scaled_par_bn"
    KIND = "par"

    reduction_factor: float = field(2.0, bottleneck.FACTOR_HELP)
    scaling: float | str = field("learned", bottleneck.SCALING_HELP)


def claims(fields: dict[str, Any]) -> bool:
    """Whether the folder holds this form."""
    return fields.get("adapter") == Config.METHOD


def from_peft(fields: dict[str, Any]) -> Config:
    """The configuration of a saved folder."""
    return cast(Config, bottleneck.read_block(Config, fields))
