"""Tensors as transformers 5 saves them, where it names or cuts them otherwise than the published checkpoint
that mlx-lm's model file reads.

Each function takes the tensors of a checkpoint, of either kind, and gives those of the published kind; the
row of an architecture names it as `rename_weights`. One corrects the model where tensors are saved no more.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlx_adapters.models.architectures.row import Config

__all__ = ["gemma3n_alone", "joined_experts", "renamed", "without_lent_keys"]

_ONE_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")
_KEYS = ("k_proj", "v_proj", "k_norm")


def renamed(parts: Mapping[str, str]) -> Callable[[dict[str, mx.array]], dict[str, mx.array]]:
    """The function that puts other parts into names: {part as it is saved: part as the model file has it}."""

    def rename(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return {
            ".".join(parts.get(part, part) for part in name.split(".")): array
            for name, array in weights.items()
        }

    return rename


def joined_experts(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Qwen 3.5 MoE: the matrices of single experts as the two stacks of the published checkpoint."""
    single: dict[str, dict[int, dict[str, mx.array]]] = {}
    named: dict[str, mx.array] = {}
    for name, array in weights.items():
        if found := _ONE_EXPERT.match(name):
            single.setdefault(found[1], {}).setdefault(int(found[2]), {})[found[3]] = array
        else:
            named[name] = array
    for stem, experts in single.items():
        rows = [experts[number] for number in sorted(experts)]
        named[f"{stem}.gate_up_proj"] = mx.stack(
            [mx.concatenate([row["gate"], row["up"]], axis=0) for row in rows]
        )
        named[f"{stem}.down_proj"] = mx.stack([row["down"] for row in rows])
    return named


def gemma3n_alone(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Gemma 3n's language model alone, under the names that it has in the model of texts and images."""
    inside = "model.language_model."
    return {
        name if name.startswith(inside) else inside + name.removeprefix("model."): array
        for name, array in weights.items()
        if not name.startswith("lm_head.")
    }


def without_lent_keys(model: Any, config: Config) -> None:
    """Gemma 3n: no projections in layers that use another layer's keys and values.

    The published checkpoint has such tensors, which nothing reads; transformers does not build them, and does
    not save them. The keys are looked up in the cache, so the model always has one.
    """
    lent = set()
    for index, layer in enumerate(model.layers):
        if layer.self_attn.is_kv_shared_layer:
            lent |= {f".layers.{index}.self_attn.{name}." for name in _KEYS}
            for name in _KEYS:
                layer.self_attn.pop(name)
    base = type(model)

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        found = base.sanitize(self, weights)
        return {name: array for name, array in found.items() if not any(part in name for part in lent)}

    def call(self: Any, inputs: mx.array, cache: Any = None, **more: Any) -> mx.array:
        made: mx.array = base.__call__(self, inputs, self.make_cache() if cache is None else cache, **more)
        return made

    model.__class__ = type(base.__name__, (base,), {"sanitize": sanitize, "__call__": call})
    model._needs_cache = True  # what `adapter.call.needs_cache` finds of other models by trying
