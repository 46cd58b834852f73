"""LoRA on a mixture of experts, whose matrices are stacked: each expert e has an update of its own.

    y = (W[e] + scale * B[e] A[e]) x

PEFT (`target_parameters`) knows two stacks in each block, and so does `Experts`: gate and up are one matrix
there and share A. In what mlx-lm has trained each of the three matrices has an `ExpertLayer`; `joined` says
the same with the two stacks of PEFT.
"""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import ConfigError
from mlx_adapters.methods.base import AdapterLayer, layer_range, plain_weight
from mlx_adapters.methods.dropout import Dropout
from mlx_adapters.models import sites
from mlx_adapters.models.routers import BLOCKS

__all__ = [
    "EXPERT_NAMES",
    "PARTS",
    "UNGATED",
    "ExpertLayer",
    "Experts",
    "by_matrix",
    "completed",
    "expert_paths",
    "in_model",
    "is_block",
    "is_stack",
    "matrices",
    "parts",
]

PARTS = ("gate_up_proj", "down_proj")
"""PEFT's names of the two stacks; the first is the one that it wraps first."""

UNGATED = ("up_proj", "down_proj")
"""The same of experts without a gate."""

EXPERT_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""In a mixture, PEFT reads these among `target_modules` as the experts' names of transformers 4."""


def is_stack(module: nn.Module) -> bool:
    """Whether `module` is one stack of matrices."""
    return type(module).__name__ in ("SwitchLinear", "QuantizedSwitchLinear")


def is_block(module: nn.Module) -> bool:
    """Whether `module` is the whole mixture of a block."""
    return type(module).__name__ in BLOCKS


def parts(block: nn.Module) -> tuple[str, str]:
    """PEFT's names of the two stacks of `block`."""
    return PARTS if "gate_proj" in block else UNGATED


def matrices(block: nn.Module) -> tuple[tuple[str, ...], str]:
    """(the matrices into the experts, the one out) of `block`."""
    return (("gate_proj", "up_proj"), "down_proj") if "gate_proj" in block else (("fc1",), "fc2")


def expert_paths(model: nn.Module, model_type: str, layers: str) -> list[str]:
    """Where the experts of the chosen layers are adapted; ConfigError where there are none."""
    keep = layer_range(layers, {sites.layer_index(path) or 0 for path in sites.linears(model)})
    found = [path for path, module in model.named_modules() if is_block(module) or is_stack(module)]
    blocks = {path for path, module in model.named_modules() if is_block(module)}
    found = [path for path in found if path.rpartition(".")[0] not in blocks]
    paths = [path for path in found if sites.layer_index(path) in keep]
    if not paths:
        raise ConfigError(f"lora: targets 'experts': no stacked experts in layers {layers!r}")
    return paths


def in_model(found: dict[str, Any], model: nn.Module, model_type: str) -> dict[str, Any]:
    """`found` by path, with the mixtures where `model` has them: their Hugging Face path does not say."""
    blocks = {sites.to_hf(path, model_type): path for path, m in model.named_modules() if is_block(m)}
    return {blocks.get(sites.to_hf(path, model_type), path): value for path, value in found.items()}


def completed(
    found: dict[str, dict[str, mx.array]],
    model: nn.Module,
    model_type: str,
    at: Callable[[str], tuple[int, float]],
    stacks: list[str],
) -> dict[str, dict[str, mx.array]]:
    """`found` with both updates of each mixture where a file is said to have one: the other is zero.

    PEFT gives the only update of a module the same names whichever stack it is of; `stacks` are its
    `target_parameters`, and `at` gives (rank, scale).
    """
    modules, made = dict(model.named_modules()), dict(found)
    for path, own in found.items():
        block = modules.get(path)
        if block is None or not is_block(block) or own.keys() != {"lora_a", "lora_b"}:
            continue
        named = [part for part in parts(block) if any(sites.matches(stack, part) for stack in stacks)]
        if len(named) != 1:
            continue
        name = sites.to_hf(path, model_type)
        sizes = [at(f"{name}.{part}") for part in parts(block)]
        fresh = Experts(block, gate_up=sizes[0], down=sizes[1], dropout=0.0).tensors()
        if named[0] == parts(block)[0]:
            own = {"gate_up_a": own["lora_a"], "gate_up_b": own["lora_b"]}
        made[path] = {n: mx.zeros(array.shape) for n, array in fresh.items()} | own
    return made


class Experts(AdapterLayer):
    """The mixture of a block with updates, in PEFT's layout: A [experts * rank, in] expert by expert,
    B [out, rank * experts] with the experts running fastest.

    `gate_up` and `down` are (rank, scale) of the two stacks; rows of gate and up take turns in B of the first
    where they are `interleaved`, else up's follow gate's.
    """

    TENSORS: ClassVar[dict[str, str]] = {
        "gate_up_a": "base_layer.lora_A.weight",
        "gate_up_b": "base_layer.lora_B.weight",
        "lora_a": "lora_A.weight",
        "lora_b": "lora_B.weight",
    }
    TARGET: ClassVar[bool] = False

    def __init__(
        self,
        base: nn.Module,
        *,
        gate_up: tuple[int, float],
        down: tuple[int, float],
        dropout: float,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        self.scales = (gate_up[1], down[1])
        self.dropout = Dropout(dropout)
        self.interleaved = interleaved
        self.into, self.out = matrices(base)
        into, out = base[self.into[0]], base[self.out]
        self.gate_up_a = _uniform((into.num_experts * gate_up[0], into.input_dims))
        self.gate_up_b = mx.zeros((len(self.into) * into.output_dims, gate_up[0] * into.num_experts))
        self.lora_a = _uniform((out.num_experts * down[0], out.input_dims))
        self.lora_b = mx.zeros((out.output_dims, down[0] * out.num_experts))

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        # mlx-lm's own forward (it sorts the tokens by expert), on stacks that add their update
        updated = {
            name: _updated(self.base[name], a, scale * b, self.dropout)
            for name, (a, b, scale) in self._updates().items()
        }
        mixture: Any = SimpleNamespace(**updated, activation=self.base.activation)
        y: mx.array = type(self.base).__call__(mixture, x, indices)
        return y

    def _updates(self) -> dict[str, tuple[mx.array, mx.array, float]]:
        """(A, B, scale) of each stack of the base."""
        experts = self.base[self.out].num_experts
        matrices = by_matrix(self.tensors(), experts, (*self.into, self.out), interleaved=self.interleaved)
        scales = dict.fromkeys(self.into, self.scales[0]) | {self.out: self.scales[1]}
        return {name: (own["lora_a"], own["lora_b"], scales[name]) for name, own in matrices.items()}

    def merge(self) -> nn.Module:
        """The mixture with the updates in its matrices, in float32."""
        merged = copy.copy(self.base)
        for name, (a, b, scale) in self._updates().items():
            merged[name] = _merged(self.base[name], scale * (b @ a))
        return merged


def by_matrix(
    arrays: dict[str, mx.array],
    experts: int,
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
    *,
    interleaved: bool = False,
) -> dict[str, dict[str, mx.array]]:
    """The arrays of `Experts` as those of an `ExpertLayer` for each of the matrices `names`, the last of
    which leads out."""

    def apart(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        return a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).transpose(2, 0, 1)

    into_a, into_b = apart(arrays["gate_up_a"], arrays["gate_up_b"])
    out_a, out_b = apart(arrays["lora_a"], arrays["lora_b"])
    *into, out = names
    count = len(into)
    rows = [into_b[:, n::count] for n in range(count)] if interleaved else mx.split(into_b, count, axis=1)
    found = {name: {"lora_a": into_a, "lora_b": b} for name, b in zip(into, rows, strict=True)}
    return found | {out: {"lora_a": out_a, "lora_b": out_b}}


class ExpertLayer(AdapterLayer):
    """One stack of matrices with updates: A [experts, rank, in], B [experts, out, rank].

    PEFT does not know these tensors, so their names are our own.
    """

    TENSORS: ClassVar[dict[str, str]] = {"lora_a": "lora_A.experts", "lora_b": "lora_B.experts"}

    def __init__(self, base: nn.Module, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.dropout = Dropout(dropout)
        self.lora_a = _uniform((base.num_experts, rank, base.input_dims))
        self.lora_b = mx.zeros((base.num_experts, base.output_dims, rank))

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        updated = _updated(self.base, self.lora_a, self.scale * self.lora_b, self.dropout)
        return updated(x, indices, sorted_indices)

    def merge(self) -> nn.Module:
        """The stack with the update in each matrix, in float32."""
        return _merged(self.base, self.scale * (self.lora_b @ self.lora_a))


def _uniform(shape: tuple[int, ...]) -> mx.array:
    bound = 1 / math.sqrt(shape[-1])
    return mx.random.uniform(-bound, bound, shape)


def _updated(base: nn.Module, a: mx.array, b: mx.array, dropout: Dropout) -> Callable[..., mx.array]:
    def call(x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y: mx.array = base(x, indices, sorted_indices=sorted_indices)
        update = dropout(x).astype(mx.float32)
        for matrices in (a, b):
            transposed = matrices.swapaxes(-1, -2)
            update = mx.gather_mm(update, transposed, rhs_indices=indices, sorted_indices=sorted_indices)
        return y + update.astype(y.dtype)

    return call


def _merged(base: nn.Module, update: mx.array) -> nn.Module:
    from mlx_lm.models.switch_layers import SwitchLinear

    merged: nn.Module = SwitchLinear(1, 1, 1, bias=False)
    merged.weight = plain_weight(base).astype(mx.float32) + update
    if "bias" in base:
        merged.bias = base.bias
    return merged
