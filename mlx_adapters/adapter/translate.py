"""An adapter's tensors between the modules here and those of PyTorch.

Where mlx-lm splits a matrix, multiplies it or renames it, an update of it is split, divided or renamed in the
file, so that PEFT computes the same with it; and the other way round when a file is read. What does not go
through such a change raises an AdapterError that names the tensor.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_adapters.errors import AdapterError
from mlx_adapters.models.sites import to_hf
from mlx_adapters.models.torch_tree import Spot, TorchTree

__all__ = ["PREFIX", "Group", "Sizes", "Written", "inward", "no_origin", "outward"]

Group = dict[str, mx.array]
"""The tensors of one layer by the end of their names."""
Sizes = dict[str, tuple[int, float]]
"""(rank, scale) by module of PyTorch."""
_BY_ROW = re.compile(r"lora_B\b|lora_magnitude_vector|vera_lambda_b")  # a row for each of the output
_WHOLE = re.compile(r"(?:^|\.)(?:weight|bias)$")  # the layer's own, trained or copied
_LOOKED_UP = re.compile(r"lora_embedding_B|trainable_tokens_delta")  # a row for each token
_NAMED = re.compile(r"lora_|token_adapter|vera_|ia3_l|adapter_|learned_|rotate_|scaling|fusion_")
PREFIX = "base_model.model."
_KEY = re.compile(  # the module of a tensor, and the rest of its name
    rf".*?{re.escape(PREFIX)}(.+?)\.((?:base_layer\.|original_module\.|modules_to_save\.|ln_tuning_layers\."
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


# Out -------------------------------------------------------------------------------------------------------


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
            raise AdapterError(no_origin(path))
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
    plain = all(_plain([spot for spot, _ in pieces]) for pieces in spots.values())
    same = all(modules == (to_hf(path, tree.model_type),) for path, modules in moved.items())
    return Written(made, sizes, {} if plain and same else moved)


def _plain(spots: Sequence[Spot]) -> bool:
    """Whether a module of PyTorch is one module here, with the same rows and values."""
    return len(spots) == 1 and (spots[0].simple or not spots[0].parts)


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
    size = tree.size(module)
    whole = sum(part.count for spot in spots for part in spot.parts) >= size
    output = name == "ia3_l" and arrays[0].shape[-1] == 1 and arrays[0].shape[0] > 1
    if "vera" in name:
        raise AdapterError(_vera(module))
    if not (whole or output):
        raise AdapterError(_partly(module, name, tree))
    if not (output or _by_row(name)):
        if all(mx.array_equal(array, arrays[0]) for array in arrays[1:]):
            return arrays[0]
        raise AdapterError(f"{module}: PyTorch has one {name} for {', '.join(s.path for s in spots)}")
    rows = [spot.rows(array.shape[0])[0] for spot, array in zip(spots, arrays, strict=True)]
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
            raise AdapterError(no_origin(spot.path))
        scales, shifts = scales[:1], shifts[:1] * 0
    elif not _WHOLE.search(name) or _NAMED.search(name):
        shifts = shifts * 0
    view = (-1,) + (1,) * (array.ndim - 1)
    by, plus = (mx.array(x.astype(np.float32)).reshape(view) for x in (scales, shifts))
    return (array - plus) / by if inverse else array * by + plus


# In --------------------------------------------------------------------------------------------------------


def inward(
    tensors: dict[str, mx.array],
    tree: TorchTree,
    *,
    at: Callable[[str], tuple[int, float]] | None = None,
    only: list[str] | None = None,
) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors of a file under the names that they would have if PyTorch had the modules here.

    Also {path here: module of PyTorch}, empty where all names and rows are the same. `at` gives the (rank,
    scale) of an adapter written here, and `only` its paths, where a module of PyTorch has others beside them.
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
            made |= {f"{PREFIX}{name}.{suffix}": array for suffix, array in own.items()}
    same = all(to_hf(path, tree.model_type) == module for path, module in origin.items())
    return made, {} if same and all(_plain(own) for own in spots.values()) else origin


def _module(key: str, tree: TorchTree) -> tuple[str, str, tuple[Spot, ...]] | None:
    """(module of PyTorch, the rest of the name, where it is here) of a tensor's name."""
    found = _KEY.fullmatch(key)
    spots = tree.sources(found[1]) if found else ()
    return (spots[0].module, found[2], spots) if found and spots else None


def _divided(spots: tuple[Spot, ...], group: Group, rank: int | None) -> list[Group]:
    """The tensors of one module of PyTorch for each module that it is here."""
    if len(spots) == 1 and not spots[0].split:
        return [{name: _scaled(spots[0], name, array, inverse=False) for name, array in group.items()}]
    if any("vera" in name for name in group):
        raise AdapterError(_vera(spots[0].module))
    made: list[Group] = []
    second = next((name for name in group if re.search(r"lora_B\b", name)), None)
    blocks = _blocks(spots, group[second], rank) if second else None
    for number, spot in enumerate(spots):
        own: Group = {}
        for name, array in group.items():
            if _by_row(name) or (name == "ia3_l" and array.shape[-1] == 1):
                rows = mx.array(spot.rows(array.shape[0])[0])
                array = array[rows]
            if blocks:
                ranks = slice(number * blocks, (number + 1) * blocks)
                array = array[ranks] if "lora_A" in name else array[:, ranks] if name == second else array
            own[name] = _scaled(spot, name, array, inverse=False)
        made.append(own)
    return made


def _by_row(name: str) -> bool:
    """Whether a tensor has a row for each output of its layer."""
    own = _WHOLE.search(name) and not _NAMED.search(name)
    return bool(own or _BY_ROW.search(name))


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


def no_origin(path: str) -> str:
    """What a user is told of a layer whose adapter has no place in PyTorch."""
    return (
        f"{path}: what its weight is made of in the checkpoint is not known, so no adapter of it can be "
        "written. Leave this layer out, or convert the original checkpoint"
    )


def _mixed(path: str, modules: list[str]) -> str:
    return f"{path}: is {' and '.join(modules)} in PyTorch, and adapters of such layers are not translated"


def _vera(module: str) -> str:
    return f"{module}: is several layers here, and vera gives each of them the first rows of its B: not read"


def _partly(module: str, name: str, tree: TorchTree) -> str:
    paths = ", ".join(spot.path for spot in tree.sources(module))
    return f"{module}: is {paths} here, which only together can have {name}: adapt them all, and alike"


def _paths(pieces: list[tuple[Spot, Group]]) -> str:
    return " and ".join(spot.path for spot, _ in pieces)
