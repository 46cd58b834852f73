"""AdapterFusion's layer and its options."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import AdapterError, ConfigError, UnsupportedError
from mlx_adapters.fields import field
from mlx_adapters.methods.base import LINEARS, AdapterLayer, Layers, Member, Method, Placed, dims
from mlx_adapters.methods.peft_fields import Fields

_MEMBERS = "members"


class _Once(nn.Module):
    """Stands for `base` in the adapters of one layer: y = base(x) is computed once for all of them."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        if "bias" in base:
            self.bias = base.bias
        self.known: Any = None

    def know(self, base: nn.Module, x: mx.array | None = None, y: mx.array | None = None) -> None:
        """Remember y = base(x). A plain attribute: neither the module tree nor a gradient sees it."""
        object.__setattr__(self, "known", (base, x, y))

    def __call__(self, x: mx.array) -> mx.array:
        base, known, y = self.known
        return y if x is known else base(x).astype(mx.float32)


class Layer(AdapterLayer):
    """`h + V sum_n p_n (adapter_n(x) - h)`, h = base(x); in float32, the result in base's dtype."""

    TENSORS: ClassVar[dict[str, str]] = {
        "query": "fusion_query.weight",
        "query_bias": "fusion_query.bias",
        "key": "fusion_key.weight",
        "shift": "fusion_value.weight",
    }

    def __init__(
        self, base: nn.Module, layers: list[AdapterLayer], members: list[Member], *, width: int, value: bool
    ) -> None:
        super().__init__()
        in_dims, out_dims = dims(base)
        width = width or out_dims
        self.base = base
        if len(layers) > 1:
            self.query = 0.02 * mx.random.normal((width, out_dims))
            self.query_bias = mx.zeros(width)
            self.key = 0.02 * mx.random.normal((width, out_dims))
        if value:
            self.shift = mx.zeros((out_dims, out_dims))
        # what is frozen is kept out of the module tree: it neither trains, nor is saved as this layer's
        self.frozen = _Frozen(base, layers, in_dims, members)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        h = y.astype(mx.float32)
        added = [z - h for z in self.frozen.outputs(self.base, x, h)]
        if "query" in self:
            z = mx.stack(added, axis=-2)
            u = (h @ self.query.T + self.query_bias) @ self.key
            p = mx.softmax((z * u[..., None, :]).sum(axis=-1), axis=-1)
            fused = (p[..., None] * z).sum(axis=-2)
        else:
            fused = added[0]
        if "shift" in self:
            fused = fused + fused @ self.shift.T
        return (h + fused).astype(y.dtype)


class _Frozen:
    """The adapters' layers at one place, and the members they belong to."""

    def __init__(
        self, base: nn.Module, layers: list[AdapterLayer], in_dims: int, members: list[Member]
    ) -> None:
        self.layers, self.members = layers, members
        self.once = _Once(base)
        self.direct = [not self._works_with_once(layer, base, in_dims) for layer in layers]

    def outputs(self, base: nn.Module, x: mx.array, y: mx.array) -> list[mx.array]:
        """What each adapter makes of x, where `base` made y."""
        self.once.know(base, x, y)
        for layer, direct in zip(self.layers, self.direct, strict=True):
            layer.base = base if direct else self.once
        outputs = [layer(x).astype(mx.float32) for layer in self.layers]
        self.once.know(base)
        return outputs

    def _works_with_once(self, layer: AdapterLayer, base: nn.Module, in_dims: int) -> bool:
        """Whether the layer only calls its base; one that reads its weight needs the base itself."""
        x = mx.zeros((1, 1, in_dims))
        self.once.know(base, x, base(x).astype(mx.float32))
        layer.base = self.once
        try:
            layer(x)
        except Exception:  # whatever is missing, the base has it
            return False
        return True


class Fusion(Method):
    """AdapterFusion. Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00247

    Trained adapters stay frozen; at each layer that they adapt, attention over their outputs is learned. With
    h = base(x) and z_n = adapter_n(x) - h, what adapter n adds there, for each token on its own

        u   = (Q h + b) K                     query times key: u . z_n = (Q h + b) . (K z_n)
        p   = softmax over n of u . z_n       not divided by a width, as in the paper
        y   = h + V (p_1 z_1 + p_2 z_2 + ...)       V = I + R

    Q and K [width, out] start normal(0, 0.02), b and R at zero: a fresh fusion gives nearly equal shares. The
    paper pulls V to the identity by 0.01 |V - I|^2 in the loss; here R is what trains, so the optimizer's
    weight decay does that. A bias of the key would add the same to all scores, which softmax ignores: there
    is none. A layer that only one of the adapters has needs no attention (p is 1): it learns R alone.

    The adapters run without dropout. Their folders are kept below `members/` in the saved one, so it loads
    alone.
    """

    NAME = "fusion"
    TITLE = "AdapterFusion"
    AUTHORS = "Pfeiffer et al. 2020"
    PAPER = "https://arxiv.org/abs/2005.00247"
    PEFT_TYPE = "ADAPTER_FUSION"
    IN_PEFT = False
    LAYERS = (Layer,)

    adapters: str = field("", "folders of the trained adapters to fuse, two or more, joined by commas")
    width: int = field(0, "size of query and key; 0: the layer's output size, as in the paper")
    value: bool = field(True, "learn the value matrix; without it the layers add a weighted mean")

    def __post_init__(self) -> None:
        folders = self.members()
        if self.width < 0:
            raise ConfigError(f"fusion: width={self.width} must be at least 1, or 0 for the layer's size")
        if len(folders) < 2:
            raise ConfigError(
                f"fusion: adapters={self.adapters!r} must name two or more trained adapter folders, "
                "joined by commas"
            )
        if len(set(folders)) < len(folders):
            raise ConfigError(f"fusion: adapters={self.adapters!r} names a folder twice")

    def members(self) -> list[Path]:
        """The folders that `adapters` names; in several lines, a comma is part of a name."""
        parts = self.adapters.split("\n" if "\n" in self.adapters else ",")
        return [Path(part.strip()) for part in parts if part.strip()]

    def place_members(self, model: nn.Module, members: list[Member]) -> Placed:
        """A fusion layer wherever a member adapts a linear layer, and what else the members need."""
        modules = dict(model.named_modules())
        for member in members:
            _freeze(member, modules)
        placed: Placed = {}
        for path in dict.fromkeys(path for member in members for path in member.placed):
            here = [member.placed[path] for member in members if path in member.placed]
            layers = [layer for layer in here if isinstance(layer, AdapterLayer)]
            if 0 < len(layers) < len(here):
                folders = " and ".join(str(member.folder) for member in members if path in member.placed)
                raise UnsupportedError(
                    f"fusion: {folders} do not go together: one adapts {path}, another only reads what it "
                    "returns"
                )
            if layers:
                placed[path] = Layer(modules[path], layers, members, width=self.width, value=self.value)
                continue
            for below, module in pairwise(here):
                module.base = below  # each does its part for its own adapter, one after the other
            placed[path] = here[-1]
        return placed

    def save_extra(self, folder: Path, layers: Layers) -> None:
        """Write the members' folders below the adapter's."""
        fused = next(layer for layer in layers.values() if isinstance(layer, Layer))
        for number, member in enumerate(fused.frozen.members):
            member.save(folder / _MEMBERS / f"{number:02d}")

    def as_saved(self) -> Self:
        """With the members as `save_extra` writes them, not where they lay on this machine."""
        below = [f"{_MEMBERS}/{number:02d}" for number in range(len(self.members()))]
        return replace(self, adapters=",".join(below))

    def load_extra(self, folder: Path) -> Self:
        below = sorted((folder / _MEMBERS).glob("*/"))
        if len(below) != len(self.members()):
            raise AdapterError(
                f"{folder}: has {len(below)} of the {len(self.members())} members below {_MEMBERS}: "
                "copy the whole folder"
            )
        return replace(self, adapters="\n".join(map(str, below)))

    @classmethod
    def trial(cls, trained: Callable[[], list[Path]]) -> Self:
        return cls(adapters=",".join(map(str, trained())))

    def to_peft(self) -> Fields:
        """PEFT has no fusion; the names are ours."""
        return {"adapters": self.adapters, "width": self.width, "value": self.value}

    @classmethod
    def from_peft(cls, fields: Fields) -> Self:
        missing = [name for name in ("adapters", "width", "value") if name not in fields]
        if missing:
            raise AdapterError(f"{', '.join(missing)} missing: not a fusion's configuration")
        return cls(**{name: fields[name] for name in ("adapters", "width", "value")})


def _freeze(member: Member, modules: dict[str, nn.Module]) -> None:
    """Freeze the member's layers, without dropout. Raises for an adapter that cannot be fused."""
    for path, module in member.placed.items():
        if isinstance(module, Layer):
            raise AdapterError(f"{member.folder}: is a fusion itself: fuse the adapters it is made of")
        if isinstance(module, AdapterLayer) and not isinstance(modules.get(path), LINEARS):
            raise UnsupportedError(
                f"{member.folder}: {member.method.NAME} adapts no linear layer, and fusion weighs what is "
                "added to one"
            )
        module.freeze()
        module.eval()
