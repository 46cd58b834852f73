"""What every adapter method shares: the layer's interface, and how its targets are chosen.

The one idea (docs: CONTRIBUTING.md): an adapter is a module that stands where `base` stood. The base is
frozen first and wrapped afterwards, so what the wrapper owns is what trains.
"""

import re
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import ConfigError
from mlx_adapters.models import sites as table

__all__ = ["AdapterLayer", "dims", "plain_weight", "resolve_targets"]


class AdapterLayer(nn.Module):
    """A module that stands where `base` stood. Final methods live in the files of `methods/`.

    `TENSORS` is the two-way table attribute -> PEFT tensor suffix; from it saving, loading, export and
    import follow. The attributes have PEFT's layout already.
    """

    TENSORS: ClassVar[dict[str, str]]
    base: nn.Module

    def merge(self) -> nn.Module:
        """A linear layer equal to this one; ConfigError where the algebra does not allow it."""
        raise ConfigError(
            f"{type(self).__name__} cannot be merged into a linear layer: keep it as an adapter"
        )


def dims(linear: nn.Module) -> tuple[int, int]:
    """(input size, output size) of a linear layer, quantized or not."""
    out_dims, in_dims = linear.weight.shape
    if isinstance(linear, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        in_dims = linear.scales.shape[1] * linear.group_size
    return in_dims, out_dims


def plain_weight(linear: nn.Module) -> mx.array:
    """The weight of a linear layer or an embedding in floating point; dequantized where it was quantized."""
    if not isinstance(linear, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        return linear.weight
    return mx.dequantize(
        linear.weight,
        linear.scales,
        linear.get("biases"),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    )


def resolve_targets(
    model: nn.Module, model_type: str, *, targets: str, layers: str, default: str = "lora"
) -> list[str]:
    """Paths of the linear layers that `targets` and `layers` choose, in the order of the model.

    `targets`: `default`, `attn`, `mlp`, `attn+mlp`, `all-linear`, names joined by commas, or `re:PATTERN`
    (matched against the whole path). `layers`: `all`, `last:N`, or a range `A-B` counted from 0, ends
    included. Raises ConfigError if any part matches nothing: a silent no-op would train nothing.
    """
    linears = table.linears(model)
    chosen = _by_targets(linears, table.sites(model_type, model), targets, default, model_type)
    keep = _layer_range(layers, {table.layer_index(path) or 0 for path in linears})
    paths = [path for path in chosen if table.layer_index(path) in keep]
    if not paths:
        raise ConfigError(
            f"targets {targets!r} with layers {layers!r} match no linear layer of this {model_type} model"
        )
    return paths


def _by_targets(
    linears: dict[str, nn.Module], row: table.Sites, targets: str, default: str, model_type: str
) -> list[str]:
    if targets == "all-linear":
        return list(linears)
    if targets.startswith("re:"):
        try:
            pattern = re.compile(targets[3:])
        except re.error as error:
            raise ConfigError(f"targets {targets!r} is not a regular expression: {error}") from None
        return [path for path in linears if pattern.fullmatch(path)]
    roles = {"default": getattr(row, default), "attn": row.attn, "mlp": row.mlp}
    names: list[str] = []
    for part in re.split(r"[,+]", targets):
        names += roles.get(part.strip(), (part.strip(),))
    missing = [name for name in names if not any(_ends(path, name) for path in linears)]
    if missing:
        known = sorted({path.rpartition(".")[2] for path in linears})
        raise ConfigError(
            f"targets {', '.join(map(repr, missing))} match no linear layer of this {model_type} model. "
            f"Known: attn, mlp, all-linear, {', '.join(known)}"
        )
    return [path for path in linears if any(_ends(path, name) for name in names)]


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _layer_range(layers: str, present: set[int]) -> set[int]:
    if layers == "all":
        return present
    if found := re.fullmatch(r"last:(\d+)", layers):
        return set(sorted(present)[max(0, len(present) - int(found.group(1))) :])
    if found := re.fullmatch(r"(\d+)(?:-(\d+))?", layers):
        first, last = int(found.group(1)), int(found.group(2) or found.group(1))
        chosen = set(range(first, last + 1)) & present
        if chosen and last in present:
            return chosen
    raise ConfigError(
        f"layers {layers!r} is not a choice of the {len(present)} layers. "
        f"Use all, last:N, or A-B within 0-{len(present) - 1}"
    )
