"""Tensors as transformers 5 saves them, where it names or cuts them otherwise than the published checkpoint
that mlx-lm's model file reads.

Each function takes the tensors of a checkpoint, of either kind, and gives those of the published kind; the
row of an architecture names it as `rename_weights`.
"""

import re
from collections.abc import Callable, Mapping

import mlx.core as mx

__all__ = ["gemma3n_alone", "gemma3n_shared_keys", "joined_experts", "renamed"]

_ONE_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")
_OWN_KEYS = re.compile(r"\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm)\.")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


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
    return gemma3n_shared_keys(
        {
            name if name.startswith(inside) else inside + name.removeprefix("model."): array
            for name, array in weights.items()
            if not name.startswith("lm_head.")
        }
    )


def gemma3n_shared_keys(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Gemma 3n: zeros for the projections of layers that use another layer's keys and values.

    The published checkpoint has such tensors, which nothing reads; transformers 5 does not save them.
    """
    layers = {int(found[1]) for name in weights if (found := _LAYER.search(name)) and "language" in name}
    kept = {name: array for name, array in weights.items() if _OWN_KEYS.search(name)}
    owners = {int(found[1]) for name in kept if (found := _OWN_KEYS.search(name))}
    lent: dict[str, mx.array] = {}
    for name, array in kept.items():
        if (found := _OWN_KEYS.search(name)) and int(found[1]) == 0:
            for index in layers - owners:
                lent[_LAYER.sub(f".layers.{index}.", name, count=1)] = mx.zeros_like(array)
    return weights | lent
