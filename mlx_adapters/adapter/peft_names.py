"""PEFT's configuration between the modules here and those of PyTorch: names, ranks and scales."""

import math
import re
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_adapters.adapter.translate import PREFIX, Sizes, Written
from mlx_adapters.methods.ia3 import IA3
from mlx_adapters.methods.low_rank import LowRank
from mlx_adapters.methods.patterns import as_text, fits
from mlx_adapters.models.sites import from_hf, matches, to_hf
from mlx_adapters.models.torch_tree import TorchTree

__all__ = ["scaled_inputs", "sized", "with_fields"]

_INSIDE = "language_model"  # transformers' name of the text model beside towers for images and sound


def sized(
    method: LowRank,
    fields: dict[str, Any],
    tensors: dict[str, mx.array],
    moved: dict[str, str],
    model_type: str,
) -> LowRank:
    """LoRA of a file of PEFT's with the rank and the scale of each layer here, by the rule of PEFT there."""
    given = [fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    made: tuple[dict[str, float], dict[str, float]] = ({}, {})
    of_stacks = (".base_layer", ".experts")
    stacks = {name for name in map(_low_rank, tensors) if name and name.endswith(of_stacks)}
    for key, array in tensors.items():
        name = _low_rank(key)
        if name is None or {name, f"{name}.base_layer"} & stacks:
            continue
        module = moved.get(from_hf(name, model_type), name)
        rank_there, alpha_there = (
            next((value for key, value in pattern.items() if fits(key, module)), usual)
            for pattern, usual in zip(given, (method.rank, method.alpha), strict=True)
        )
        root = math.sqrt if method.rslora else float
        alpha = alpha_there / root(rank_there) * root(array.shape[0])
        for own, value, usual in zip(made, (array.shape[0], alpha), (method.rank, method.alpha), strict=True):
            if any(given) or not math.isclose(value, usual, rel_tol=1e-12):
                own[re.escape(name)] = value
    # PEFT's own patterns stay for stacked experts
    ranks, alphas = (own | (old if stacks else {}) for own, old in zip(made, given, strict=True))
    whole = ",".join(_saved_here(fields.get("modules_to_save") or [], moved, model_type))
    return replace(method, rank_pattern=as_text(ranks), alpha_pattern=as_text(alphas), modules_to_save=whole)


def _saved_here(names: list[str], moved: dict[str, str], model_type: str) -> list[str]:
    """Names of modules that are trained whole, where another name of theirs is needed here."""
    made: list[str] = []
    for name in names:
        own = [(to_hf(path, model_type), module) for path, module in moved.items() if module.endswith(name)]
        renamed = [path for path, _ in own if not path.endswith(name)]
        made += renamed or [name]
    return made


def scaled_inputs(method: IA3, moved: dict[str, str], model_type: str) -> IA3:
    """(IA)3 of a file of PEFT's with the layers here whose input is scaled."""
    if method.feedforward == "default":
        return method
    pattern, names = method.feedforward.removeprefix("re:"), method.feedforward.split(",")
    regular = method.feedforward.startswith("re:")
    chosen = [
        to_hf(path, model_type)
        for path, module in moved.items()
        if (re.fullmatch(pattern, module) if regular else any(matches(module, name) for name in names))
    ]
    return replace(method, feedforward=",".join(chosen))


def _low_rank(key: str) -> str | None:
    """The layer that a tensor A of LoRA is of."""
    found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_A(?:\.[^.]+)?\.weight", key)
    return found[1] if found else None


def with_fields(
    fields: dict[str, Any], written: Written, tree: TorchTree, linears: list[str]
) -> dict[str, Any]:
    """PEFT's configuration for the modules of PyTorch.

    `linears` are the paths of all linear layers here, which tell whether the end of a name says enough.
    """
    if not written.moved:
        return fields
    there: dict[str, list[str]] = {}
    for path in dict.fromkeys([*linears, *written.moved]):
        modules = written.moved.get(path) or (tree.path(path),)
        name = to_hf(path, tree.model_type)
        for key in (name, name.rpartition(".")[2]):
            there.setdefault(key, []).extend(modules)
    everything = {module for path in linears for module in (tree.path(path),)}
    adapted = set(written.groups)
    made = dict(fields)
    for field in ("target_modules", "feedforward_modules"):
        if isinstance(names := fields.get(field), list):
            meant = {module for name in names for module in there.get(name, [name])}
            made[field] = _short(
                meant & adapted if field == "target_modules" else meant, everything | adapted
            )
    if isinstance(names := fields.get("modules_to_save"), list):
        made["modules_to_save"] = [module for name in names for module in _saved_there(name, written, tree)]
    if isinstance(parameters := fields.get("target_parameters"), list):
        made["target_parameters"] = [_parameter(name, there) for name in parameters]
    if written.sizes and "r" in fields:
        made |= _patterns(fields, written.sizes)
    return made


def _short(meant: set[str], everything: set[str]) -> list[str]:
    """Ends of names where they say exactly which modules are meant; a tower beside the text has the same."""
    if any(_INSIDE in module.split(".") for module in meant):
        return sorted(meant)
    ends = {module.rpartition(".")[2] for module in meant}
    named = {module for module in everything if module.rpartition(".")[2] in ends}
    return sorted(ends if named <= meant and not any(end.isdigit() for end in ends) else meant)


def _saved_there(name: str, written: Written, tree: TorchTree) -> list[str]:
    """The inverse of `_saved_here` for one name."""
    own = {m for path, ms in written.moved.items() for m in ms if to_hf(path, tree.model_type).endswith(name)}
    return [name] if all(module.endswith(name) for module in own) else sorted(own)


def _parameter(name: str, there: dict[str, list[str]]) -> str:
    module, _, last = name.rpartition(".")
    return f"{there[module][0]}.{last}" if module in there else name


def _patterns(fields: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """`rank_pattern` and `alpha_pattern` by whole names, for what is not the usual."""
    rank, alpha = fields["r"], float(fields["lora_alpha"])
    ranks = {re.escape(module): own for module, (own, _) in sizes.items() if own != rank}
    alphas = {}
    for module, (own, scale) in sizes.items():
        wanted = scale * (math.sqrt(own) if fields.get("use_rslora") else own)
        if not math.isclose(wanted, alpha, rel_tol=1e-12):
            alphas[re.escape(module)] = wanted
    kept = {name: value for name, value in (("rank_pattern", ranks), ("alpha_pattern", alphas)) if value}
    return {name: {} for name in fields.keys() & {"rank_pattern", "alpha_pattern"}} | kept
