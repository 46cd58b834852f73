"""What the bottleneck methods share: the function f, its starts, and the two layers that use it.

    f(x) = s * (up(act(down(x))))        s: a number, or learned and starting at 1

`down` is [bottleneck, in] and `up` [out, bottleneck]. Starts: `mam_adapter` (He et al. 2021, arXiv
2110.04366): down kaiming-uniform(a = sqrt 5), up zero, so a fresh adapter is the base; `bert` (Houlsby et al.
2019, arXiv 1902.00751): both normal(0, 0.02), so it is not.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import AdapterError, ConfigError, UnsupportedError, unknown
from mlx_adapters.fields import field
from mlx_adapters.methods.activations import ACTIVATIONS
from mlx_adapters.methods.base import (
    LAYERS_HELP,
    TARGETS_HELP,
    AdapterLayer,
    Method,
    Placed,
    dims,
    peft_targets,
    resolve_targets,
)
from mlx_adapters.methods.beside import WHOLE, WithModules
from mlx_adapters.methods.dropout import Dropout
from mlx_adapters.methods.peft_fields import Fields
from mlx_adapters.models import sites
from mlx_adapters.models.architectures.row import Architecture
from mlx_adapters.models.discover import architecture_of

__all__ = [
    "ACTIVATION_HELP",
    "FACTOR_HELP",
    "INITS",
    "INIT_HELP",
    "SCALING_HELP",
    "BlockBottleneck",
    "BlockLayer",
    "Layer",
    "LinearBottleneck",
]

INITS = ("mam_adapter", "bert")

FACTOR_HELP = "the model's width divided by the bottleneck's"
ACTIVATION_HELP = "one of transformers' activation names: relu, swish, gelu ..."
SCALING_HELP = "factor in front of the bottleneck, or learned"
INIT_HELP = "mam_adapter: a fresh adapter is the base; bert: it is not"


def _check(config: "LinearBottleneck | BlockBottleneck") -> None:
    """Raise one ConfigError that lists every option that a bottleneck cannot have."""
    size, scaling, problems = config.bottleneck_size, config.scaling, []
    if size is not None and size < 1:
        problems.append(f"bottleneck_size={size} must be at least 1")
    if isinstance(config, BlockBottleneck) and not 1 <= config.reduction_factor < math.inf:
        problems.append(f"reduction_factor={config.reduction_factor} must be a number of at least 1")
    if config.non_linearity not in ACTIVATIONS:
        problems.append(unknown("non_linearity", config.non_linearity, ACTIVATIONS))
    if not 0 <= config.dropout < 1:
        problems.append(f"dropout={config.dropout} must be at least 0 and below 1")
    if scaling != "learned" and (isinstance(scaling, str) or not math.isfinite(scaling)):
        problems.append(f"scaling={scaling!r} must be a finite number or 'learned'")
    if config.init not in INITS:
        problems.append(unknown("init", config.init, INITS))
    if problems:
        raise ConfigError("; ".join(f"{config.NAME}: {problem}" for problem in problems))


def _settings(config: "LinearBottleneck | BlockBottleneck") -> Fields:
    """What the layers take from the options besides their size."""
    return {
        "non_linearity": config.non_linearity,
        "scaling": config.scaling,
        "dropout": config.dropout,
        "init": config.init,
    }


def _start(shape: tuple[int, int], init: str, *, zero: bool) -> mx.array:
    if init == "bert":
        return mx.random.normal(shape, scale=0.02)
    bound = 1 / math.sqrt(shape[1])
    return mx.zeros(shape) if zero else mx.random.uniform(-bound, bound, shape)


class Layer(AdapterLayer):
    """A bottleneck on one linear layer, without biases; x is [.., in], the result [.., out].

    pre       base(x + f(x)),         f on `in`
    post      z = base(x); z + f(z),  f on `out`
    parallel  base(x) + f(x),         f from `in` to `out`
    """

    TENSORS: ClassVar[dict[str, str]] = {
        "down": "adapter_down.weight",
        "up": "adapter_up.weight",
        "scaling": "adapter_scaling",
    }

    def __init__(
        self,
        base: nn.Module,
        *,
        kind: str,
        size: int,
        non_linearity: str,
        scaling: float | str,
        dropout: float,
        init: str,
    ) -> None:
        super().__init__()
        in_dims, out_dims = dims(base)
        into = out_dims if kind == "post" else in_dims
        out_of = in_dims if kind == "pre" else out_dims
        self.base = base
        self.kind = kind
        self.dropout = Dropout(dropout)
        self.act = ACTIVATIONS[non_linearity]
        self.down = _start((size, into), init, zero=False)
        self.up = _start((out_of, size), init, zero=True)
        self.scaling = mx.ones((1,)) if scaling == "learned" else float(scaling)

    def _f(self, x: mx.array) -> mx.array:
        # the narrow array is the cheap place to scale
        return (self.act(self.dropout(x) @ self.down.T) * self.scaling) @ self.up.T

    def __call__(self, x: mx.array) -> mx.array:
        if self.kind == "pre":
            return self.base(x + self._f(x).astype(x.dtype))
        y = self.base(x)
        return y + self._f(y if self.kind == "post" else x).astype(y.dtype)


# ours -> LLM-Adapters' name of the field
_NAMES = {
    "bottleneck_size": "bottleneck_size",
    "non_linearity": "non_linearity",
    "dropout": "adapter_dropout",
    "scaling": "scaling",
    "init": "init_weights",
}


class LinearBottleneck(WithModules):
    """Bottlenecks on linear layers: the options of series and parallel, and their LLM-Adapters folders."""

    PEFT_TYPE = "BOTTLENECK"
    IN_PEFT = False
    LAYERS = (Layer, *WHOLE)

    bottleneck_size: int = field(256, "width of the bottleneck")
    non_linearity: str = field("tanh", "one of transformers' activation names: tanh, relu, gelu, silu ...")
    scaling: float | str = field(1.0, "factor s in front of the bottleneck, or learned")
    dropout: float = field(0.0, "dropout on the bottleneck's input while training")
    init: str = field("mam_adapter", INIT_HELP)
    targets: str = field("default", TARGETS_HELP)
    layers: str = field("all", LAYERS_HELP)

    def __post_init__(self) -> None:
        _check(self)

    def layer(self, base: nn.Module, kind: str) -> Layer:
        """The layer of that kind that takes the place of `base`."""
        return Layer(base, kind=kind, size=self.bottleneck_size, **_settings(self))

    def to_peft(self) -> Fields:
        """LLM-Adapters' fields that series and parallel adapters share."""
        named = {theirs: getattr(self, ours) for ours, theirs in _NAMES.items()}
        if named["scaling"] != "learned":
            named["scaling"] = float(named["scaling"])  # the fork has no forward for an int
        return {**named, "bias": "none", **self.modules_field()}

    @classmethod
    def options_in(cls, fields: Fields) -> Fields:
        """The options that LLM-Adapters' fields give. Raises AdapterError for what is missing or not
        supported."""
        if fields.get("bias") not in (None, "none"):
            raise AdapterError(f"bias={fields['bias']!r} is not supported: biases of the base are not read")
        if "bottleneck_size" not in fields:
            raise AdapterError("bottleneck_size missing: not a BOTTLENECK configuration of LLM-Adapters")
        values = {ours: fields[theirs] for ours, theirs in _NAMES.items() if theirs in fields}
        return values | {"targets": peft_targets(fields), **cls.read_modules(fields)}

    @classmethod
    def from_peft(cls, fields: Fields) -> Self:
        return cls.from_fields(cls.options_in(fields))


class BlockLayer(AdapterLayer):
    """A bottleneck with biases behind a sublayer's last linear layer, which returns s [.., width].

        double  s + f(s)
        seq     s + f(h + s)
        par     s + f(h)

    h is the residual stream that enters the sublayer, before its norm; `residual()` gives it. f has no
    dropout inside: it acts on f's result, as AdapterHub has it.
    """

    TENSORS: ClassVar[dict[str, str]] = {
        "down": "adapter_down.0.weight",
        "down_bias": "adapter_down.0.bias",
        "up": "adapter_up.weight",
        "up_bias": "adapter_up.bias",
        "scaling": "scaling",
    }

    def __init__(
        self,
        base: nn.Module,
        *,
        kind: str,
        size: int,
        non_linearity: str,
        scaling: float | str,
        dropout: float,
        init: str,
        residual: "Callable[[], mx.array] | None",
    ) -> None:
        super().__init__()
        width = dims(base)[1]
        self.base = base
        self.kind = kind
        self.residual = residual
        self.dropout = Dropout(dropout)
        self.act = ACTIVATIONS[non_linearity]
        self.down, self.down_bias = _start((size, width), init, zero=False), mx.zeros(size)
        self.up, self.up_bias = _start((width, size), init, zero=True), mx.zeros(width)
        self.scaling = mx.ones((1,)) if scaling == "learned" else float(scaling)

    def __call__(self, x: mx.array) -> mx.array:
        s = self.base(x)
        read = s
        if self.residual is not None:
            # some model files lay the rows of a batch end to end before their MLP
            h = self.residual().reshape(s.shape)
            read = h if self.kind == "par" else h + s
        f = (self.act(read @ self.down.T + self.down_bias) @ self.up.T + self.up_bias) * self.scaling
        return s + self.dropout(f).astype(s.dtype)


class _Recorder(nn.Module):
    """Stands where `base` stood and remembers its last input (or output) for the block's adapter."""

    def __init__(self, base: nn.Module, *, output: bool) -> None:
        super().__init__()
        self.base = base
        self.output = output
        self.slot = _Slot()

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        self.slot.put(y if self.output else x)
        return y


class _Slot:
    """What a recorder saw, until all who read it have. A plain object: MLX would take an array on the module
    for a parameter, and kept it would hold a stream per block in memory between two forward passes."""

    def __init__(self) -> None:
        self.readers = 0
        self._left = 0
        self._value: mx.array | None = None

    def put(self, value: mx.array) -> None:
        self._value, self._left = value, self.readers

    def take(self) -> mx.array:
        value = self._value
        if value is None:
            raise UnsupportedError("the MLP ran before the norm that reads the residual stream for it")
        self._left -= 1
        if self._left <= 0:
            self._value = None
        return value


class BlockBottleneck(Method):
    """Bottlenecks behind whole sublayers, in AdapterHub's four forms.

    `KIND` says what the layers read: `double` stands behind attention and MLP, `seq` and `par` behind the
    MLP.
    """

    PEFT_TYPE = "ADAPTERHUB"
    IN_PEFT = False
    LAYERS = (BlockLayer,)
    KIND: ClassVar[str]

    reduction_factor: float = field(16.0, FACTOR_HELP)
    bottleneck_size: int | None = field(None, "width of the bottleneck; overrides the reduction factor")
    non_linearity: str = field("relu", ACTIVATION_HELP)
    scaling: float | str = field(1.0, SCALING_HELP)
    dropout: float = field(0.0, "dropout on the bottleneck's output while training")
    init: str = field("mam_adapter", INIT_HELP)
    layers: str = field("all", LAYERS_HELP)

    def __post_init__(self) -> None:
        _check(self)

    def size(self, width: int) -> int:
        """The bottleneck of a model of `width`."""
        return self.bottleneck_size or max(1, int(width // self.reduction_factor))

    def place(self, model: nn.Module, model_type: str, paths: list[str] | None = None) -> Placed:
        """BlockLayers behind the sublayers, and the recorders that they read h from.

        Raises UnsupportedError where the architecture has no place to read h.
        """
        row = architecture_of(model, model_type)
        outs = (row.attn_out, row.mlp_out, *row.other_outs) if self.KIND == "double" else (row.mlp_out,)
        if not row.mlp_out:
            raise UnsupportedError(
                f"{self.NAME}: no linear layer leads out of the MLPs of a {model_type} model (its experts "
                "are stacked, or it has none). Use lora, or parallel"
            )
        if paths is None:
            names = ",".join(filter(None, outs))
            paths = resolve_targets(model, model_type, targets=names, layers=self.layers)
        modules, placed = dict(model.named_modules()), dict[str, nn.Module]()
        recorders: dict[str, _Recorder] = {}
        for path in paths:
            slots = []
            for name, output in _sources(path, row, modules, model_type, self.NAME, self.KIND):
                if name not in recorders:
                    recorders[name] = _Recorder(modules[name], output=output)
                slots.append(recorders[name].slot)
            placed[path] = BlockLayer(
                modules[path],
                kind=self.KIND,
                size=self.size(dims(modules[path])[1]),
                residual=_sum(slots),
                **_settings(self),
            )
        return placed | recorders

    @classmethod
    def claims(cls, fields: Fields) -> bool:
        """Whether the folder holds this form."""
        return fields.get("adapter") == cls.NAME

    def to_peft(self) -> Fields:
        """What our folder says of the form."""
        return {"adapter": self.NAME, **asdict(self)}

    @classmethod
    def from_peft(cls, fields: Fields) -> Self:
        return cls.from_fields({name: fields[name] for name in cls.__dataclass_fields__ if name in fields})


def _sum(slots: list[_Slot]) -> Callable[[], mx.array] | None:
    if not slots:
        return None

    def residual() -> mx.array:
        first, *others = [slot.take() for slot in slots]
        return sum(others, first)

    for slot in slots:
        slot.readers += 1
    return residual


def _sources(
    path: str, row: Architecture, modules: dict[str, Any], model_type: str, method: str, kind: str
) -> list[tuple[str, bool]]:
    """Where h is read for the MLP behind `path`: (path, whether its output rather than its input)."""
    if getattr(getattr(modules[""], "args", None), "do_layer_norm_before", True) is False:
        raise UnsupportedError(
            f"{method}: this {model_type} model has its norms behind the sublayers (do_layer_norm_before is "
            "false), so no norm reads the residual stream. Use double_seq_bn, series or parallel"
        )
    index = sites.layer_index(path)
    block = path[: path.index(f".{index}.") + len(f".{index}")]

    def find(name: str | None) -> str | None:
        inside = (p for p in modules if p.startswith(block + "."))
        return next((p for p in inside if name and sites.matches(p, name)), None)

    if kind == "double" or (kind == "seq" and row.residual == "none"):
        return []  # AdapterHub finds no residual stream in Phi and gives the adapter s alone
    if norm := find(row.pre_mlp):
        return [(norm, False)]
    if row.residual == "with attention" and (norm := find(row.pre_attn)) and (out := find(row.attn_out)):
        # AdapterHub applies GPT-J's attention first: its adapter sees the stream with attention added
        return [(norm, False), (out, True)]
    raise UnsupportedError(
        f"{method}: a {model_type} model has no norm before its MLP that is known to read the residual "
        "stream. Use double_seq_bn, series or parallel"
    )
