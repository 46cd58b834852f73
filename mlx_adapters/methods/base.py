"""What every adapter method shares: its interface, its layers' interface, and how its targets are chosen.

The one idea (docs: CONTRIBUTING.md): an adapter is a module that stands where `base` stood. The base is
frozen first and wrapped afterwards, so what the wrapper owns is what trains.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, dataclass_transform

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import AdapterError, ConfigError, UnsupportedError
from mlx_adapters.fields import parse_fields
from mlx_adapters.methods.peft_fields import Fields, Known
from mlx_adapters.models import sites as table
from mlx_adapters.models.architectures.row import Architecture
from mlx_adapters.models.discover import architecture_of
from mlx_adapters.models.sites import Site

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

__all__ = [
    "LAYERS_HELP",
    "LINEARS",
    "TARGETS_HELP",
    "AdapterLayer",
    "Layers",
    "Member",
    "Method",
    "OnEmbedding",
    "Placed",
    "Site",
    "dims",
    "layer_range",
    "linear_like",
    "peft_targets",
    "plain_weight",
    "resolve_targets",
    "short_names",
    "site_of",
]

LINEARS = (nn.Linear, nn.QuantizedLinear)
Placed = dict[str, nn.Module]
"""The modules of an adapter, by their paths in the model."""
TARGETS_HELP = "default, attn, mlp, attn+mlp, all-linear, names a,b or re:PATTERN"
LAYERS_HELP = "all, last:N or A-B (from 0, ends included)"


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Method(ABC):
    """An adapter method with its options.

    A subclass becomes a frozen, keyword-only dataclass. Its fields are the options, in Python, in `--set`, in
    YAML and in the saved JSON; their help texts become the Args of its docstring. A method that puts one
    layer on each of the chosen linear layers defines `select` and `wrap`, any other one defines `place`.
    """

    NAME: ClassVar[str]
    """What saved folders, YAML and `--method` call it."""
    TITLE: ClassVar[str]
    AUTHORS: ClassVar[str]
    PAPER: ClassVar[str]
    """The authors of the paper with its year, and its address."""
    PEFT_TYPE: ClassVar[str]
    """`peft_type` of `adapter_config.json`."""
    PEFT_FIELDS: ClassVar[Known | None] = None
    """What is known of PEFT's configuration (methods/peft_fields.py); the rest is refused. None: not
    checked."""
    LAYERS: ClassVar[tuple[type["AdapterLayer"], ...]]
    STANDS_ON: ClassVar[str] = "linear layers"
    """What its layers take the place of."""
    IN_PEFT: ClassVar[bool] = True
    """Whether a release of PEFT has the method. If not, the file format is ours or another project's."""
    AUTO_MODEL: ClassVar[bool] = True
    """Whether `AutoModelForCausalLM.from_pretrained` opens the folder, which PEFT opens."""
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        explanation = cleandoc(cls.__doc__ or "")
        dataclass(frozen=True, kw_only=True)(cls)
        options = [
            f"{one.name}: {one.metadata.get('help')}. Default: {one.default!r}." for one in fields(cls)
        ]
        cls.__doc__ = "\n    ".join([f"{explanation}\n\nArgs:", *options])

    @classmethod
    def explanation(cls) -> str:
        """The docstring without its Args: what the method computes."""
        return cleandoc(cls.__doc__ or "").partition("\n\nArgs:")[0]

    @classmethod
    def mergeable(cls) -> bool:
        """Whether all its layers can become a part of the layers they wrap."""
        return all(layer.merge is not AdapterLayer.merge for layer in cls.LAYERS)

    def select(self, model: nn.Module, model_type: str) -> list[str]:
        """Paths of the linear layers to wrap, in the order of the model."""
        raise NotImplementedError(f"{type(self).__name__} defines neither select and wrap, nor place")

    def wrap(self, base: nn.Module, site: Site) -> "AdapterLayer":
        """The layer that takes the place of `base`, which stands at `site`."""
        raise NotImplementedError(f"{type(self).__name__} defines neither select and wrap, nor place")

    def place(self, model: nn.Module, model_type: str, paths: list[str] | None = None) -> Placed:
        """What goes where, by path: adapter layers, and whatever else the method needs in the module tree.

        `paths` are the layers that a saved adapter names; without them the options choose. The model stays as
        it is. Raises ConfigError or UnsupportedError where nothing can be placed.
        """
        modules = dict(model.named_modules())
        chosen = self.select(model, model_type) if paths is None else paths
        return {path: self.wrap(modules[path], site_of(path, model, model_type)) for path in chosen}

    def members(self) -> list[Path]:
        """Folders of the trained adapters that this one is made of: none, but for fusion."""
        return []

    def place_members(self, model: nn.Module, members: list["Member"]) -> Placed:
        """`place` for a method with `members`."""
        raise NotImplementedError(f"{type(self).__name__} is not made of other adapters")

    @abstractmethod
    def to_peft(self) -> Fields:
        """The fields of `adapter_config.json`, besides those that every adapter has."""

    @classmethod
    @abstractmethod
    def from_peft(cls, fields: Fields) -> Self:
        """The method that an `adapter_config.json` describes; AdapterError names what is not supported."""

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        """The method with options from a file; AdapterError for one of another type or out of range."""
        try:
            return parse_fields(cls, fields, where=cls.NAME)
        except ConfigError as error:
            raise AdapterError(str(error)) from None

    @classmethod
    def claims(cls, fields: Fields) -> bool:
        """Whether a configuration is this method's, where several share a PEFT_TYPE."""
        return True

    def peft_extra(self, layers: "Layers", model: nn.Module, model_type: str) -> Fields:
        """Fields of `adapter_config.json` that depend on the model."""
        return {}

    def lr_multipliers(self) -> dict[str, float]:
        """{attribute: factor on its learning rate}, for attributes that learn faster than the others."""
        return {}

    def whole_modules(self) -> str | None:
        """Names of modules that are trained whole, joined by commas; None where the method has none."""
        return None

    def with_tokenizer(self, tokenizer: "TokenizerWrapper") -> Self:
        """The method, completed by what only the tokenizer knows."""
        return self

    def as_saved(self) -> Self:
        """The method of the saved folder, where it is not the trained one."""
        return self

    def save_extra(self, folder: Path, layers: "Layers") -> None:
        """Write what else the adapter's folder needs."""
        return

    def load_extra(self, folder: Path) -> Self:
        """The method, pointed at what `save_extra` wrote to `folder`."""
        return self

    @classmethod
    def trial(cls, trained: Callable[[], list[Path]]) -> Self:
        """The method to try on a tiny model, with its defaults; `trained` makes two LoRA adapters for it."""
        return cls()


@dataclass(frozen=True)
class Member:
    """A trained adapter that another one is made of: its layers by path, with their weights.

    `save` writes its folder anew.
    """

    folder: Path
    method: Method
    placed: Placed
    save: Callable[[Path], None]


class AdapterLayer(nn.Module):
    """A module that stands where `base` stood. Final methods live in the files of `methods/`.

    `TENSORS` is the two-way table attribute -> tensor suffix in the adapter file; from it saving, loading,
    export and import follow. The attributes have the file's layout already. `ALIASES` holds other suffixes
    that are read. `SHARED` is the same for arrays that all layers of an adapter share and that the file
    holds once, under the name given; they do not train.
    """

    TENSORS: ClassVar[dict[str, str]]
    ALIASES: ClassVar[dict[str, str]] = {}
    SHARED: ClassVar[dict[str, str]] = {}
    ROOTED: ClassVar[bool] = False
    """Its suffixes are whole tensor names: at most one such layer stands in a model."""
    TARGET: ClassVar[bool] = True
    """Whether its layer stands among PEFT's `target_modules`."""
    CALLED: ClassVar[str] = ""
    """What PEFT's `target_modules` call it, where that is not the name of the module it stands for."""
    READS_WEIGHT: ClassVar[bool] = False
    """What it computes follows from the weight of `base`, which must then be no other adapter's layer."""
    ROWWISE: ClassVar[bool] = True
    """Whether some rows of a batch can go through it and others not; a whole block has the batch's cache."""
    base: nn.Module

    def tensors(self) -> dict[str, mx.array]:
        """The arrays to save, by attribute of `TENSORS`."""
        return {name: getattr(self, name) for name in self.TENSORS if name in self}

    def accept(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """What of the arrays in a file is the layer's own; AdapterError where the rest means something."""
        return arrays

    def load_weights(self, arrays: dict[str, mx.array]) -> None:
        """Take saved arrays, of the shapes that `tensors()` has."""
        for name, array in arrays.items():
            setattr(self, name, array)

    def merge(self) -> nn.Module:
        """A linear layer equal to this one; ConfigError where the algebra does not allow it."""
        raise ConfigError(
            f"{type(self).__name__} cannot be merged into a linear layer: keep it as an adapter"
        )

    def virtual_ids(self) -> list[int]:
        """Token ids to stand in front of every row, which only this layer understands (prompt tuning)."""
        return []

    def start_cache(self, model: nn.Module, rows: int) -> list[Any] | None:
        """A cache for `rows` rows that starts full (prefix tuning); None for an empty one."""
        return None


Layers = dict[str, AdapterLayer]
"""Adapter layers by the path of the module that they wrap."""


class OnEmbedding(AdapterLayer):
    """A layer that stands where the token embedding stood: what a tied output head uses passes through."""

    @property
    def weight(self) -> mx.array:
        """The base's: models with a tied head look it up here."""
        return self.base.weight

    def as_linear(self, x: mx.array) -> mx.array:
        """A tied head is the base's: it has no update, and predicts no virtual tokens."""
        return self.base.as_linear(x)


def dims(linear: nn.Module) -> tuple[int, int]:
    """(input size, output size) of a linear layer, quantized or not, or of the one below an adapter's."""
    while "weight" not in linear and "base" in linear:
        linear = linear.base
    out_dims, in_dims = linear.weight.shape
    if isinstance(linear, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        in_dims = linear.scales.shape[1] * linear.group_size
    return in_dims, out_dims


def plain_weight(linear: nn.Module) -> mx.array:
    """The weight of a linear layer or an embedding in floating point; dequantized where it was quantized."""
    if "scales" not in linear:
        return linear.weight
    return mx.dequantize(
        linear.weight,
        linear.scales,
        linear.get("biases"),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    )


def linear_like(base: nn.Module, weight: mx.array, bias: mx.array | None = None) -> nn.Linear:
    """A plain linear layer of `weight` [out, in], with `bias` or else the bias of `base`."""
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    merged.weight = weight
    if bias is not None or "bias" in base:
        merged.bias = base.bias if bias is None else bias
    return merged


def site_of(path: str, model: nn.Module, model_type: str) -> Site:
    """Where `path` is in the architecture."""
    row = architecture_of(model, model_type)
    roles = {"attn": row.attn, "mlp": row.mlp}
    role = next((r for r, names in roles.items() if any(table.matches(path, n) for n in names)), "")
    return Site(path=path, model_type=model_type, role=role, side=table.side(path, row))


def short_names(paths: set[str], model: nn.Module, model_type: str) -> dict[str, str]:
    """What to call each of `paths` in a list of targets: the last part of the name where such parts say
    exactly which linear layers are meant, the whole Hugging Face path where they do not (the number of a
    module in a list would name a block too)."""
    everything = {path.removesuffix(".base") for path in table.linears(model)}
    short = {path: path.rpartition(".")[2] for path in paths}
    meant = {path for path in everything if path.rpartition(".")[2] in short.values()}
    if meant <= paths and not any(name.isdigit() for name in short.values()):
        return short
    return {path: table.to_hf(path, model_type) for path in paths}


def peft_targets(fields: Fields, otherwise: str = "default") -> str:
    """The `target_modules` of a PEFT configuration as our `targets`; a pattern is not taken, since a file's
    tensors say which layers there are."""
    chosen = fields.get("target_modules")
    return ",".join(sorted(chosen)) if isinstance(chosen, list) and chosen else otherwise


def resolve_targets(
    model: nn.Module, model_type: str, *, targets: str, layers: str, default: str = "lora"
) -> list[str]:
    """Paths of the linear layers that `targets` and `layers` choose, in the order of the model.

    `targets`: `default` (those of the architecture that the argument `default` names), `attn`, `mlp`,
    `attn+mlp`, `all-linear`, names joined by commas, or `re:PATTERN` (matched against the whole path).
    `layers`: `all`, `last:N`, or a range `A-B` counted from 0, ends included. Raises ConfigError if any part
    matches nothing: a silent no-op would train nothing.
    """
    linears, row = table.linears(model), architecture_of(model, model_type)
    if targets == "default" and not getattr(row, default):
        stacked = any(type(module).__name__.endswith("SwitchLinear") for module in model.modules())
        why = ": its experts are stacked in SwitchLinear layers" if stacked else ""
        raise UnsupportedError(
            f"a {model_type} model has no linear layer that is a default target here{why}. "
            "Set targets to attn, all-linear, or names"
        )
    chosen = _by_targets(linears, row, targets, default, model_type)
    keep = layer_range(layers, {table.layer_index(path) or 0 for path in linears})
    paths = [path for path in chosen if table.layer_index(path) in keep]
    if not paths:
        raise ConfigError(
            f"targets {targets!r} with layers {layers!r} match no linear layer of this {model_type} model"
        )
    return paths


def _by_targets(
    linears: dict[str, nn.Module], row: Architecture, targets: str, default: str, model_type: str
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
    missing = [name for name in names if not any(table.matches(path, name) for path in linears)]
    if "experts" in missing:
        raise UnsupportedError(
            "targets 'experts': only method lora adapts stacked experts. Use attn or names"
        )
    if missing:
        known = sorted({path.rpartition(".")[2] for path in linears})
        raise ConfigError(
            f"targets {', '.join(map(repr, missing))} match no linear layer of this {model_type} model. "
            f"Known: attn, mlp, all-linear, {', '.join(known)}"
        )
    return [path for path in linears if any(table.matches(path, name) for name in names)]


def layer_range(layers: str, present: set[int]) -> set[int]:
    """The numbers of blocks that `layers` chooses of those present; ConfigError where it chooses none."""
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
