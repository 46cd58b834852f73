"""An adapter's modules in the tree of a model: put in their places, found there, and taken out again."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_adapters.adapter.meta import AdapterMeta
from mlx_adapters.errors import AdapterError
from mlx_adapters.methods.base import AdapterLayer, Placed, dims

__all__ = [
    "AdapterSet",
    "Attached",
    "Choice",
    "Slot",
    "adapter_set",
    "attached",
    "count",
    "forget",
    "install",
    "layers",
    "must_be_bare",
    "note",
    "remove",
    "slots_of",
]

Choice = tuple[str, ...]
"""The adapters of a stack, the first one first; empty for the base."""


@dataclass
class Slot:
    """A place in the module tree: what holds it, and the base's module there (None: nothing stands there)."""

    parent: Any  # a module or a list of modules
    key: str | int
    original: nn.Module | None

    def put(self, module: nn.Module | None) -> None:
        """Let `module` stand here; None for nothing."""
        if module is None:
            self.parent.pop(self.key, None)
        else:
            self.parent[self.key] = module


@dataclass
class Attached:
    """What a model knows of the adapter attached to it. A plain object: no parameter of the model.

    `originals` are the base's modules by path, None where nothing stood. No parent: one may be the model, and
    a cycle would keep its memory until the garbage collector runs.
    """

    meta: AdapterMeta
    originals: dict[str, nn.Module | None]


@dataclass
class AdapterSet:
    """What a model knows of its adapters loaded by name. A plain object: no parameter of the model.

    `placed` holds each adapter's modules by path, `trainable` what of them can train, `slots` every place
    that one of them adapts. `trains` is whether the active adapter trains, `mixing` whether rows are being
    mixed.
    """

    metas: dict[str, AdapterMeta] = field(default_factory=dict)
    placed: dict[str, Placed] = field(default_factory=dict)
    trainable: dict[str, list[tuple[nn.Module, list[str]]]] = field(default_factory=dict)
    slots: dict[str, Slot] = field(default_factory=dict)
    active: Choice = ()
    trains: bool = False
    mixing: bool = False


def attached(model: nn.Module) -> Attached | None:
    """The record of the adapter attached to `model`, if there is one."""
    found: Attached | None = getattr(model, "attached_adapter", None)
    return found


def note(model: nn.Module, meta: AdapterMeta) -> None:
    """Remember of the adapter attached to `model` what its training found out: template, seen questions."""
    if (record := attached(model)) is not None:
        record.meta = meta


def adapter_set(model: nn.Module) -> AdapterSet | None:
    """The adapters that `model` holds by name, if it holds any."""
    found: AdapterSet | None = getattr(model, "adapter_set", None)
    return found


def must_be_bare(model: nn.Module) -> None:
    """Raise AdapterError for a model that carries an adapter."""
    if layers(model):
        raise AdapterError("the model carries an adapter already: detach it first")
    if adapter_set(model) is not None:
        raise AdapterError("the model holds adapters by name: add one with multi.load_adapters")


def slots_of(model: nn.Module, paths: Collection[str]) -> dict[str, Slot]:
    """The places of `paths`. One where nothing stands (a prefix's) is a new attribute of the model."""
    present = {path for path, _ in model.named_modules()}
    return {path: _slot(model, path) if path in present else Slot(model, path, None) for path in paths}


def _slot(model: nn.Module, path: str) -> Slot:
    parent: Any = model
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        parent = parent[part]
    return Slot(parent, last, parent[last])


def install(model: nn.Module, placed: Placed, meta: AdapterMeta) -> None:
    """Put an adapter's modules into a bare model, which then knows how to save and to remove it."""
    slots = slots_of(model, placed.keys())
    for path, module in placed.items():
        slots[path].put(module)
    model.attached_adapter = Attached(meta, {path: slot.original for path, slot in slots.items()})


def remove(model: nn.Module, record: Attached) -> None:
    """Put the base's modules back where they stood."""
    for path, slot in slots_of(model, record.originals.keys()).items():
        slot.put(record.originals[path])
    forget(model)


def forget(model: nn.Module) -> None:
    """Forget the adapter of a model whose layers were merged, so that what they replaced can be freed."""
    vars(model).pop("attached_adapter", None)


def layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The attached adapter layers, by the path of the layer they wrap."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterLayer)}


def count(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; a quantized weight counts as many as it stands for."""
    trainable = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
    quantized = {
        f"{path}.weight": dims(module)[0] * dims(module)[1]
        for path, module in model.named_modules()
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    }
    total = 0
    for name, array in tree_flatten(model.parameters()):
        packed = name.rpartition(".")[0] + ".weight" in quantized
        if name in quantized:
            total += quantized[name]
        elif not (packed and name.endswith((".scales", ".biases"))):
            total += array.size
    return trainable, total
