"""Whether the tensors of an adapter's file are all there, and where the configuration says they are."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import AdapterError, counted
from mlx_adapters.methods.base import LINEARS, Method, plain_weight
from mlx_adapters.methods.experts import EXPERT_NAMES, is_stack
from mlx_adapters.methods.low_rank import LowRank
from mlx_adapters.methods.modules import EMBEDDINGS
from mlx_adapters.methods.peft_fields import is_target
from mlx_adapters.methods.tied import HEAD
from mlx_adapters.models import sites
from mlx_adapters.models.architectures.table import architecture
from mlx_adapters.models.routers import routers
from mlx_adapters.models.torch_names import towers
from mlx_adapters.models.torch_tree import torch_path, tree_of

__all__ = ["Model", "check_tensors", "without_towers"]

Arrays = dict[str, mx.array]
_ROUNDED, _QUANTIZED = 0.01, 0.1  # how far a copy may be off, by the mean size of the values


@dataclass(frozen=True)
class Model:
    """The bare model that an adapter is for; `name` is what errors call it."""

    network: nn.Module
    kind: str
    name: str


def check_tensors(
    grouped: dict[str, Arrays], model: Model, *, method: Method, fields: dict[str, Any], from_torch: bool
) -> None:
    """AdapterError where the tensors of a file, {path: {attribute: array}}, are not those of an adapter of
    `model`, or not all of them. Takes out of `grouped` what the file holds of the base.

    `fields` are PEFT's, empty where PEFT does not have the method.
    """
    whole = method.whole_modules()
    copies = _copies_of_base(
        grouped, whole, method.bias if isinstance(method, LowRank) else "none", model.kind
    )
    tied = sites.tied(model.network)
    heads = {path for path in copies if sites.is_head(path)} if tied else set()
    own = grouped.keys() - ({HEAD} if tied and whole is not None else set())  # `place` says if it can
    _check_places({*own, *(copies.keys() - heads)}, model)
    _check_copies(copies, model)
    if from_torch:
        _check_norms(grouped, model)
    if isinstance(fields.get("target_modules"), list | str):
        _check_targets(grouped, fields, model)


def without_towers(grouped: dict[str, Arrays], model_type: str, folder: Path) -> dict[str, Arrays]:
    """The tensors of a file without those of layers that text does not pass: a name like q_proj is found by
    PEFT in the tower for images, too. Says so on stderr; AdapterError where nothing else is there."""
    places = tuple(f"{tower}." for tower in towers(model_type))
    inside = [path for path in grouped if f"{path}.".startswith(places)] if places else []
    if not inside:
        return grouped
    tower = inside[0].removeprefix("model.").partition(".")[0]
    if len(inside) == len(grouped):
        raise AdapterError(f"{folder}: adapts the {tower} alone, which text does not pass: nothing to load")
    print(
        f"mlx-adapters: {folder}: left out {counted(len(inside), 'layer')} of the {tower}, which text does "
        "not pass",
        file=sys.stderr,
    )
    return {path: own for path, own in grouped.items() if path not in set(inside)}


def _copies_of_base(
    grouped: dict[str, Arrays], whole: str | None, bias: str, model_type: str
) -> dict[str, Arrays]:
    """What a file holds of the base: {path: {"weight" or "bias": array}}. PEFT writes the embedding and the
    head beside an adapter on them, and a whole state dict holds everything.

    `whole` names PEFT's modules_to_save, whose weights are the adapter's own; None where the method has none.
    `bias` is PEFT's field: which biases of the base are.
    """
    copies: dict[str, Arrays] = {}
    for path, own in list(grouped.items()):
        found = {name: own.pop(f"base.{name}") for name in ("weight", "bias") if f"base.{name}" in own}
        unnamed = whole is not None and not _saved(path, whole, model_type)
        alone = own.keys() <= {"weight", "bias"}
        for name in own.keys() & {"weight", "bias"} if unnamed else ():
            if name == "weight" or bias == "none" or (alone and bias != "all"):
                found[name] = own.pop(name)
        if found:
            copies[path] = found
        if not own:
            del grouped[path]
    if not grouped:
        raise AdapterError("its tensors are the base's, there is none of an adapter")
    return copies


def _saved(path: str, whole: str, model_type: str) -> bool:
    """PEFT's rule: a name is the end of the path, and need not begin where a module's name does."""
    names = [name.strip() for name in whole.split(",") if name.strip()]
    return any(sites.to_hf(path, model_type).endswith(name) for name in names)


def _check_places(paths: set[str], model: Model) -> None:
    """AdapterError for tensors of layers that the model does not have."""
    strange = sorted(paths - {path for path, _ in model.network.named_modules()} - {""})
    if not strange:
        return
    if sites.tied(model.network) and all(map(sites.is_head, strange)):
        raise AdapterError(
            f"it adapts the output head {strange[0]}, which in {model.name} is the token embedding itself "
            "(tied): an adapter of the head alone is not read"
        )
    raise AdapterError(
        f"{len(strange)} layers are not in {model.name}, e.g. {strange[0]}: this adapter belongs to another "
        "model"
    )


def _check_norms(grouped: dict[str, Arrays], model: Model) -> None:
    """AdapterError for norms that PyTorch trained, where mlx-lm keeps their weights otherwise."""
    norms = [path for path in grouped if "norm" in path.rpartition(".")[2]]
    if norms and architecture(model.kind).shifted_norms and tree_of(model.network, model.kind).names is None:
        raise AdapterError(
            f"it holds a trained {norms[0]}, which mlx-lm keeps one larger in a {model.kind} model: not read"
        )


def _check_copies(copies: dict[str, Arrays], model: Model) -> None:
    """AdapterError for what a file holds of the base and this base has otherwise: PyTorch would take it."""
    modules = dict(model.network.named_modules())
    turned = sites.linears(model.network) if architecture(model.kind).conv1d else {}
    for path, copy in copies.items():
        base = modules[path if path in modules else sites.embedding(model.network)]  # a tied head is that
        for name, theirs in copy.items():
            theirs = theirs.T if path in turned else theirs
            own = plain_weight(base) if name == "weight" else base.get(name)
            if own is None or own.shape != theirs.shape:
                found = "none" if own is None else list(own.shape)
                raise AdapterError(
                    f"it brings the base's {path}.{name} along, {list(theirs.shape)}, and this base has "
                    f"{found}: resize the base in PyTorch as for the training (its vocabulary, most likely), "
                    "and convert that"
                )
            near = _QUANTIZED if "scales" in base else _ROUNDED
            apart = float(mx.abs(theirs - own).mean())
            if apart > near * float(mx.abs(own).mean()):
                raise AdapterError(
                    f"it brings the base's {path}.{name} along with other values than this base has: put "
                    "them into the base in PyTorch, and convert that"
                )


def _check_targets(grouped: dict[str, Arrays], fields: dict[str, Any], model: Model) -> None:
    """AdapterError where PEFT's configuration names layers that have no tensors, or tensors stand at layers
    that it does not name: PyTorch would leave out both without a word."""
    names = ",".join(fields.get("modules_to_save") or ())
    weighted = {path for path, module in model.network.named_modules() if "weight" in module}
    whole = {path for path in weighted if names and _saved(path, names, model.kind)}
    places = _places(model.network, str(fields["peft_type"])) - whole
    places -= {path for path, own in grouped.items() if own.keys() == {"bias"}}  # a bias that is trained
    places -= {path for path, own in grouped.items() if "rows" in own}  # tokens that are
    # a module of PyTorch may be several here
    there = {path: torch_path(model.network, path, model.kind) for path in {*places, *whole, *grouped}}
    named = {path for path in places if is_target(fields, there[path])} | whole
    held = {there[path] for path in grouped}
    if lost := sorted(path for path in named if there[path] not in held):
        raise AdapterError(
            f"{len(lost)} of {len(named)} layers that the configuration names have no tensors here, e.g. "
            f"{lost[0]}: the file is not complete. Save the adapter again"
        )
    if strange := sorted((places & grouped.keys()) - named):
        raise AdapterError(
            f"{len(strange)} layers have tensors, e.g. {strange[0]}, but target_modules does not name them, "
            "so PEFT leaves them out: one of the two was changed"
        )


def _places(model: nn.Module, peft_type: str) -> set[str]:
    """The layers on which PEFT's rule can be checked here."""
    modules = dict(model.named_modules())
    if peft_type == "LN_TUNING":
        return {p for p, m in modules.items() if "weight" in m and "norm" in type(m).__name__.lower()}
    places = set(sites.linears(model))
    places |= {path for path, m in modules.items() if sites.is_head(path) and isinstance(m, LINEARS)}
    if peft_type == "LORA":
        places |= {path for path, m in modules.items() if sites.is_table(path) and isinstance(m, EMBEDDINGS)}
    if any(is_stack(module) for module in modules.values()):
        # among stacked experts PEFT reads these names in another way, and routers are parameters there
        places = {path for path in places if path.rpartition(".")[2] not in EXPERT_NAMES}
        places -= routers(model).keys()
    return places
