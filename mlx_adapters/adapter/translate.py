"""An adapter's tensors between the modules here and those of PyTorch.

Where mlx-lm splits a matrix, multiplies it or renames it, an update of it is split, divided or renamed in the
file, so that PEFT computes the same with it; and the other way round when a file is read. What does not go
through such a change raises an AdapterError that names the tensor.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_adapters.errors import AdapterError
from mlx_adapters.methods.ia3 import IA3
from mlx_adapters.methods.low_rank import LowRank
from mlx_adapters.methods.patterns import as_text, fits
from mlx_adapters.models.sites import from_hf, matches, to_hf
from mlx_adapters.models.torch_tree import Spot, TorchTree

__all__ = ["Group", "Sizes", "Written", "inward", "outward", "scaled_inputs", "sized", "with_fields"]

Group = dict[str, mx.array]
"""The tensors of one layer by the end of their names."""
Sizes = dict[str, tuple[int, float]]
"""(rank, scale) by module of PyTorch."""
_BY_ROW = re.compile(r"lora_B\b|lora_magnitude_vector|vera_lambda_b")  # a row for each of the output
_WHOLE = re.compile(r"(?:^|\.)(?:weight|bias)$")  # the layer's own, trained or copied
_LOOKED_UP = re.compile(r"lora_embedding_B|trainable_tokens_delta")  # a row for each token
_NAMED = re.compile(r"lora_|token_adapter|vera_|ia3_l|adapter_|learned_|rotate_|scaling|fusion_")
_PREFIX = "base_model.model."
_INSIDE = "language_model"  # transformers' name of the text model beside towers for images and sound
_KEY = re.compile(  # the module of a tensor, and the rest of its name
    rf".*?{re.escape(_PREFIX)}(.+?)\.((?:base_layer\.|original_module\.|modules_to_save\.|ln_tuning_layers\."
    r"|lora_|vera_|ia3_l|token_adapter\.|adapter_|learned_|rotate_|scaling|fusion_|weight$|bias$).*)"
)


@dataclass(frozen=True)
class Written:
    """What stands in a file: the tensors by module of PyTorch, and the size of each low-rank update.

    `moved` says which modules of PyTorch each path became; it is empty where all names are the same.
    """

    groups: dict[str, Group]
    sizes: Sizes
    moved: dict[str, tuple[str, ...]]


# Out ---------------------------------------------------------------------------------------------------------


def outward(
    groups: dict[str, Group], tree: TorchTree, at: Callable[[str], tuple[int, float]] | None
) -> Written:
    """The tensors of layers, by path, as those of the modules of PyTorch.

    `at` gives (rank, scale) of a low-rank update by the Hugging Face name of its layer. AdapterError for a
    tensor that no module there has.
    """
    spots: dict[str, list[tuple[Spot, Group]]] = {}
    moved: dict[str, tuple[str, ...]] = {}
    for path, own in groups.items():
        if any(suffix.endswith(".experts") for suffix in own):
            spots.setdefault(path, []).append((Spot(path, path, ()), own))  # no tensors of PEFT's
            continue
        found = tree.spots(path)
        if not found:
            raise AdapterError(_unknown(path))
        if len(found) > 1:
            raise AdapterError(_mixed(path, [spot.module for spot in found]))
        spots.setdefault(found[0].module, []).append((found[0], own))
        moved[path] = (found[0].module,)
    made: dict[str, Group] = {}
    sizes: Sizes = {}
    for module, pieces in spots.items():
        pieces.sort(key=lambda piece: [part.rows or () for part in piece[0].parts])
        made[module], size = _joined(module, pieces, tree, at)
        if size is not None:
            sizes[module] = size
    plain = all(len(p) == 1 and (p[0][0].simple or not p[0][0].parts) for p in spots.values())
    same = all(modules == (to_hf(path, tree.model_type),) for path, modules in moved.items())
    return Written(made, sizes, {} if plain and same else moved)


def _joined(
    module: str,
    pieces: list[tuple[Spot, Group]],
    tree: TorchTree,
    at: Callable[[str], tuple[int, float]] | None,
) -> tuple[Group, tuple[int, float] | None]:
    own = [_unscaled(spot, group) for spot, group in pieces]
    sizes = [
        at(to_hf(spot.path, tree.model_type))
        for spot, group in pieces
        if at is not None and any(re.search(r"(?<!base_layer\.)lora_[AB]\.weight$", name) for name in group)
    ]
    if len(pieces) == 1 and not pieces[0][0].split:
        return own[0], sizes[0] if sizes else None
    names = sorted({name for group in own for name in group})
    if any(names != sorted(group) for group in own):
        raise AdapterError(
            f"{module}: its parts {_paths(pieces)} are adapted in different ways: adapt them alike"
        )
    spots = [spot for spot, _ in pieces]
    made = _joined_low_rank(module, spots, own, tree) if "lora_A.weight" in names else {}
    for name in names:
        if name not in made:
            made[name] = _joined_plain(module, name, spots, [group[name] for group in own], tree)
    if not sizes:
        return made, None
    if len({scale for _, scale in sizes}) > 1:
        raise AdapterError(f"{module}: its parts {_paths(pieces)} have different scales: give them one")
    return made, (made["lora_A.weight"].shape[0], sizes[0][1])


def _joined_low_rank(module: str, spots: list[Spot], own: list[Group], tree: TorchTree) -> Group:
    """One update of all rows: A is shared where the parts have the same, and stacked where not."""
    firsts, seconds = ([group[f"lora_{which}.weight"] for group in own] for which in "AB")
    shared = all(a.shape == firsts[0].shape and mx.array_equal(a, firsts[0]) for a in firsts[1:])
    rank = firsts[0].shape[0] if shared else sum(a.shape[0] for a in firsts)
    total = np.zeros((tree.size(module), rank), dtype=np.float32)
    start = 0
    for spot, b in zip(spots, seconds, strict=True):
        rows, _, _ = spot.rows(b.shape[0])
        total[rows, start : start + b.shape[1]] = np.array(b.astype(mx.float32))
        start += 0 if shared else b.shape[1]
    return {
        "lora_A.weight": firsts[0] if shared else mx.concatenate(firsts),
        "lora_B.weight": mx.array(total),
    }


def _joined_plain(
    module: str, name: str, spots: list[Spot], arrays: list[mx.array], tree: TorchTree
) -> mx.array:
    """Rows put together: (IA)3's, a magnitude, or a whole weight."""
    output = name == "ia3_l" and arrays[0].shape[-1] == 1 and arrays[0].shape[0] > 1
    if not (output or _BY_ROW.search(name) or _WHOLE.search(name)):
        if all(mx.array_equal(array, arrays[0]) for array in arrays[1:]):
            return arrays[0]
        raise AdapterError(f"{module}: PyTorch has one {name} for {', '.join(s.path for s in spots)}")
    rows = [spot.rows(array.shape[0])[0] for spot, array in zip(spots, arrays, strict=True)]
    size = tree.size(module)
    if sum(map(len, rows)) < size and not output and "vera" not in name:
        paths = ", ".join(spot.path for spot in tree.sources(module))
        raise AdapterError(
            f"{module}: is {paths} here, which only together can have a {name}: adapt them all"
        )
    total = np.full((size, *arrays[0].shape[1:]), 1.0 if output else 0.0, dtype=np.float32)
    for own, array in zip(rows, arrays, strict=True):
        total[own] = np.array(array.astype(mx.float32))
    return mx.array(total)


def _unscaled(spot: Spot, group: Group) -> Group:
    """The tensors of a layer for the weight that PyTorch has, which mlx-lm keeps changed."""
    return {name: _scaled(spot, name, array, inverse=True) for name, array in group.items()}


def _scaled(spot: Spot, name: str, array: mx.array, *, inverse: bool) -> mx.array:
    if spot.simple or all(part.scale == 1 and part.shift == 0 for part in spot.parts):
        return array
    if _NAMED.search(name) and not (_BY_ROW.search(name) or _LOOKED_UP.search(name)):
        if re.search(r"(?<!token_)adapter_|learned_|rotate_|fusion_|scaling", name):
            raise AdapterError(
                f"{spot.path}: mlx-lm keeps its weight multiplied, and {name} does not go through that: "
                "leave this layer out"
            )
        return array
    if name.endswith("bias"):
        return array  # its own origin is another tensor's
    looked_up = _LOOKED_UP.search(name)
    _, scales, shifts = spot.rows(1 if looked_up else array.shape[0])
    if looked_up:
        if len(set(scales)) > 1:
            raise AdapterError(_unknown(spot.path))
        scales, shifts = scales[:1], shifts[:1] * 0
    elif not _WHOLE.search(name) or _NAMED.search(name):
        shifts = shifts * 0
    view = (-1,) + (1,) * (array.ndim - 1)
    by, plus = (mx.array(x.astype(np.float32)).reshape(view) for x in (scales, shifts))
    return (array - plus) / by if inverse else array * by + plus


# In ----------------------------------------------------------------------------------------------------------


def inward(
    tensors: dict[str, mx.array],
    tree: TorchTree,
    *,
    at: Callable[[str], tuple[int, float]] | None = None,
    only: list[str] | None = None,
) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors of a file under the names that they would have if PyTorch had the modules here.

    Also {path here: module of PyTorch}, for those that were renamed or changed. `at` gives the (rank, scale)
    of an adapter written here, and `only` its paths, where a module of PyTorch has others beside them.
    """
    groups: dict[str, Group] = {}
    made: dict[str, mx.array] = {}
    spots: dict[str, tuple[Spot, ...]] = {}
    for key, array in tensors.items():
        found = _module(key, tree)
        if found is None:
            made[key] = array
            continue
        module, suffix, spots[module] = found
        groups.setdefault(module, {})[suffix] = array
    origin: dict[str, str] = {}
    for module, group in groups.items():
        if any(len(tree.spots(spot.path)) > 1 for spot in spots[module]):
            raise AdapterError(
                _mixed(spots[module][0].path, [s.module for s in tree.spots(spots[module][0].path)])
            )
        first = to_hf(spots[module][0].path, tree.model_type)
        divided = _divided(spots[module], group, at(first)[0] if at else None)
        for spot, own in zip(spots[module], divided, strict=True):
            if only is not None and spot.path not in only:
                continue
            origin[spot.path] = module
            name = to_hf(spot.path, tree.model_type)
            made |= {f"{_PREFIX}{name}.{suffix}": array for suffix, array in own.items()}
    return made, origin


def _module(key: str, tree: TorchTree) -> tuple[str, str, tuple[Spot, ...]] | None:
    """(module of PyTorch, the rest of the name, where it is here) of a tensor's name."""
    found = _KEY.fullmatch(key)
    spots = tree.sources(found[1]) if found else ()
    return (spots[0].module, found[2], spots) if found and spots else None


def _divided(spots: tuple[Spot, ...], group: Group, rank: int | None) -> list[Group]:
    """The tensors of one module of PyTorch for each module that it is here."""
    if len(spots) == 1 and not spots[0].split:
        return [{name: _scaled(spots[0], name, array, inverse=False) for name, array in group.items()}]
    made: list[Group] = []
    second = next((name for name in group if re.search(r"lora_B\b", name)), None)
    blocks = _blocks(spots, group[second], rank) if second else None
    for number, spot in enumerate(spots):
        own: Group = {}
        for name, array in group.items():
            by_row = _BY_ROW.search(name) or (_WHOLE.search(name) and not re.search("lora_A", name))
            if by_row or (name == "ia3_l" and array.shape[-1] == 1):
                rows = mx.array(spot.rows(array.shape[0])[0])
                array = array[rows]
            if blocks:
                ranks = slice(number * blocks, (number + 1) * blocks)
                array = array[ranks] if "lora_A" in name else array[:, ranks] if name == second else array
            own[name] = _scaled(spot, name, array, inverse=False)
        made.append(own)
    return made


def _blocks(spots: tuple[Spot, ...], b: mx.array, wanted: int | None) -> int | None:
    """The rank of each part, where each has columns of B for itself: then they were stacked when written."""
    rank = b.shape[1] // len(spots)
    if b.shape[1] % len(spots) or (wanted is not None and rank != wanted):
        return None
    values = np.array(b.astype(mx.float32))
    for number, spot in enumerate(spots):
        others = np.delete(
            values[spot.rows(len(values))[0]], np.s_[number * rank : (number + 1) * rank], axis=1
        )
        if others.any():
            return None
    return rank if wanted or values.any() else None


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
    found = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_A(?:\.[^.]+)?\.weight", key)
    return found[1] if found else None


# The configuration -------------------------------------------------------------------------------------------


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
    return {**dict.fromkeys(fields.keys() & {"rank_pattern", "alpha_pattern"}, {}), **kept}


def _unknown(path: str) -> str:
    return (
        f"{path}: what its weight is made of in the checkpoint is not known, so no adapter of it can be written "
        "for PyTorch. Leave this layer out"
    )


def _mixed(path: str, modules: list[str]) -> str:
    return f"{path}: is {' and '.join(modules)} in PyTorch, and adapters of such layers are not translated"


def _paths(pieces: list[tuple[Spot, Group]]) -> str:
    return " and ".join(spot.path for spot, _ in pieces)
