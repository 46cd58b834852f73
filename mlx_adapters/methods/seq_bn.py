"""Pfeiffer's adapter: a bottleneck after the MLP, reading the residual stream too. Pfeiffer et al. 2020,
https://arxiv.org/abs/2005.00052

    y = h + s + f(h + s),    f(x) = scaling * (up(act(down(x) + bias)) + bias)

It stands behind the MLP of a block. `h` is the residual stream
before the sublayer's norm, `s` what the sublayer returns; the formula and its place are AdapterHub's
(`adapters` 1.3), whose library opens the export.
"""

from dataclasses import dataclass
from typing import Any, cast

from mlx_adapters.methods import bottleneck

PEFT_TYPE = "ADAPTERHUB"
IN_PEFT = False
Layer = bottleneck.BlockLayer
place = bottleneck.place_blocks
to_peft = bottleneck.block_fields


@dataclass(frozen=True, kw_only=True)
class Config(bottleneck.BlockConfig):
    """Fields of `--method seq_bn`."""

    METHOD = "seq_bn"
    KIND = "seq"


def claims(fields: dict[str, Any]) -> bool:
    """Whether the folder holds this form."""
    return fields.get("adapter") == Config.METHOD


def from_peft(fields: dict[str, Any]) -> Config:
    """The configuration of a saved folder."""
    return cast(Config, bottleneck.read_block(Config, fields))
