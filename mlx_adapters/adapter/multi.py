"""Several adapters on one base: loaded by name, switched at run time, stacked, or one per row of a batch.

    load_several(loaded, {"math": folder, "chat": other})    nothing is active yet: the base answers
    activate(loaded.model, "math")
    activate(loaded.model, ["math", "chat"])                 a stack
    activate(loaded.model, None)                             the base again
    with rows(loaded.model, ["math", None, "chat"]):         row 0 by math, row 1 by the base, row 2 by chat
        logits = call_model(loaded.model, ids)

The module tree holds the base and the active adapters, nothing else; switching exchanges a module at each
adapted path. So whatever reads the tree (training, saving, virtual tokens) sees the active adapter alone, a
model without an active one is the base itself, and an adapter that is not active costs memory only. The
base's arrays exist once.

In a stack the second adapter's base is the first one's layer: on a linear layer with adapters a, b

    y = a(x),  a has base W        then        y = b(x),  b has base a

For adapters that add to W x (LoRA, parallel) the updates add up and the order does not matter; for one that
scales or transforms (IA3, DoRA, series) the second works on the first one's result. Where only one of them
has a layer, that layer works alone.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters import adapter
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.errors import AdapterError, AdaptersError, UnsupportedError, unknown
from mlx_adapters.methods.base import AdapterLayer
from mlx_adapters.models.load import LanguageModel, describe

__all__ = ["activate", "active", "load_several", "names", "rows", "unload"]

Choice = tuple[str, ...]
"""The adapters of a stack, the first one first; empty for the base."""


@dataclass
class _Slot:
    """A place in the module tree: what holds it, and the base's module there (None: nothing stands there)."""

    parent: Any
    key: str | int
    original: nn.Module | None

    def put(self, module: nn.Module | None) -> None:
        if module is None:
            self.parent.pop(self.key, None)
        else:
            self.parent[self.key] = module


@dataclass
class _Several:
    """What a model knows of its adapters. A plain object: nothing in here is a parameter of the model."""

    metas: dict[str, AdapterMeta] = field(default_factory=dict)
    placed: dict[str, dict[str, nn.Module]] = field(default_factory=dict)
    trainable: dict[str, list[tuple[nn.Module, list[str]]]] = field(default_factory=dict)
    slots: dict[str, _Slot] = field(default_factory=dict)
    active: Choice = ()
    trains: bool = False
    mixing: bool = False


def load_several(loaded: LanguageModel, folders: Mapping[str, Path | str]) -> dict[str, AdapterMeta]:
    """Load adapter folders under the names given, beside those already there; which is active stays.

    All of them or, when one raises AdapterError, none.
    """
    model = loaded.model
    held = getattr(model, "several", None) or _Several()
    if held.mixing:
        raise AdapterError("adapters cannot be loaded inside `with rows(...)`")
    for name in folders:
        if not name or name in held.metas:
            raise AdapterError(f"adapter name {name!r} is {'taken' if name else 'empty'}: choose another")
    if not held.metas and adapter.layers(model):
        raise AdapterError("the model carries an adapter already: load the base again first")
    before, trains = held.active, held.trains
    if held.metas:
        activate(model, None)  # an adapter is built on the bare base
    done: dict[str, AdapterMeta] = {}
    try:
        for name, folder in folders.items():
            meta, placed = adapter.build(
                model, loaded.config["model_type"], Path(folder), name=str(loaded.path)
            )
            _take(held, model, name, placed)
            done[name] = held.metas[name] = replace(meta, base={**describe(loaded), **meta.base})
    except AdaptersError:
        for name in done:
            _forget(held, name)
        raise
    finally:
        if held.metas:
            model.several = held
            activate(model, before, train=trains)
    return done


def names(model: nn.Module) -> list[str]:
    """The adapters loaded by name, in that order."""
    held = getattr(model, "several", None)
    return list(held.metas) if held else []


def active(model: nn.Module) -> tuple[str, ...]:
    """The active adapters, the lowest of a stack first; empty when the base answers."""
    held = getattr(model, "several", None)
    return held.active if held else ()


def activate(model: nn.Module, which: str | Sequence[str] | None, *, train: bool = False) -> None:
    """Make one adapter answer, several as a stack, or with None the base.

    Nothing trains afterwards, or with `train` that one adapter does. Raises AdapterError for a name that is
    not loaded, UnsupportedError for adapters that do not stack.
    """
    held = _held(model)
    if held.mixing:
        raise AdapterError("adapters cannot be switched inside `with rows(...)`")
    choice = _choice(held, which)
    if train and len(choice) != 1:
        raise UnsupportedError(
            f"{len(choice)} adapters cannot train at once: activate one by name to train it"
        )
    tree = {path: _stacked(held, path, choice) for path in held.slots}
    if held.trains:
        for module in held.placed[held.active[0]].values():
            module.freeze()
    _put(held, model, tree)
    held.active, held.trains = choice, train
    if train:
        for module, keys in held.trainable[choice[0]]:
            module.unfreeze(recurse=False, keys=keys)


@contextmanager
def rows(model: nn.Module, which: Sequence[str | Sequence[str] | None]) -> Iterator[None]:
    """Inside, the rows of a batch use different adapters: `which` says for each row what `activate` takes.

    Every batch must have `len(which)` rows. Nothing trains. Adapters on the prompt change the number of
    tokens and the cache of a whole batch, those on whole blocks share its cache: UnsupportedError where rows
    differ and one of them has such.
    """
    held = _held(model)
    if held.mixing:
        raise AdapterError("`with rows(...)` cannot be nested")
    choices = [_choice(held, row) for row in which]
    if not choices:
        raise AdapterError("rows(...) is empty: name an adapter or None for each row of the batch")
    before, trains = held.active, held.trains
    mixed = {name for choice in choices for name in choice} if len(set(choices)) > 1 else set()
    if found := [name for name in held.metas if name in mixed and not _rowwise(held, name)]:
        raise UnsupportedError(
            f"adapter {found[0]!r} ({held.metas[found[0]].method}) stands on whole blocks, which run once "
            "for all rows of a batch. Run its rows in a batch of their own"
        )
    if found := _on_prompt(held, mixed):
        raise UnsupportedError(
            f"adapter {found[0]!r} ({held.metas[found[0]].method}) puts virtual tokens before the text: in a "
            "batch every row would have to have them. Run its rows in a batch of their own"
        )
    activate(model, choices[0] if len(set(choices)) == 1 else None)
    try:
        _put(held, model, {path: _mixed(held, path, choices) for path in held.slots})
        held.mixing = True
        yield
    finally:
        held.mixing = False
        activate(model, before, train=trains)


def unload(model: nn.Module, name: str) -> None:
    """Forget an adapter and free its arrays. Raises AdapterError while it is active."""
    held = _held(model)
    _choice(held, name)
    if held.mixing or name in held.active:
        raise AdapterError(f"adapter {name!r} is active: activate another one or None before unloading it")
    _forget(held, name)
    if not held.metas:
        del model.several


class Rows(nn.Module):
    """Sends each row of x [rows, ...] through the module of its adapter."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        different = {id(module): module for module in modules}
        groups = [[i for i, module in enumerate(modules) if id(module) == key] for key in different]
        self.branches = list(different.values())
        self.split = _Split(groups)

    def __call__(self, *given: mx.array) -> mx.array:
        """`given` is x, and for a mixture of experts also which of them each token goes to."""
        if given[0].shape[0] != self.split.count:
            raise AdapterError(
                f"the batch has {given[0].shape[0]} rows, but rows(...) named adapters for {self.split.count}"
            )
        parts = [
            branch(*(array[index] for array in given))
            for branch, index in zip(self.branches, self.split.groups, strict=True)
        ]
        return mx.concatenate(parts)[self.split.back]


class _Split:
    """Which rows go together, and the way back. Kept out of the module: its arrays are no parameters."""

    def __init__(self, groups: list[list[int]]) -> None:
        order = [row for group in groups for row in group]
        self.count = len(order)
        self.groups = [mx.array(group) for group in groups]
        self.back = mx.array(sorted(range(len(order)), key=order.__getitem__))


def _held(model: nn.Module) -> _Several:
    held: _Several | None = getattr(model, "several", None)
    if held is None:
        raise AdapterError("the model holds no adapters by name: load them with several.load_several")
    return held


def _choice(held: _Several, which: str | Sequence[str] | None) -> Choice:
    choice = (which,) if isinstance(which, str) else tuple(which or ())
    for name in choice:
        if name not in held.metas:
            raise AdapterError(unknown("adapter", str(name), held.metas))
    if len(set(choice)) < len(choice):
        raise AdapterError(f"the stack {', '.join(choice)} names an adapter twice")
    if len(on_prompt := _on_prompt(held, choice)) > 1:
        raise UnsupportedError(
            f"adapters {' and '.join(map(repr, on_prompt))} both put virtual tokens before the text: "
            "a stack can have one of that kind"
        )
    return choice


def _rowwise(held: _Several, name: str) -> bool:
    layers = (module for module in held.placed[name].values() if isinstance(module, AdapterLayer))
    return all(layer.ROWWISE for layer in layers)


def _on_prompt(held: _Several, among: set[str] | Choice) -> list[str]:
    """The adapters that act on the prompt."""
    return [
        name
        for name in held.metas
        if name in among
        and any(
            type(module).virtual_ids is not AdapterLayer.virtual_ids
            or type(module).start_cache is not AdapterLayer.start_cache
            for module in held.placed[name].values()
            if isinstance(module, AdapterLayer)
        )
    ]


def _stacked(held: _Several, path: str, choice: Choice) -> nn.Module | None:
    """What stands at `path` when `choice` is active."""
    here = [name for name in choice if path in held.placed[name]]
    if not here:
        return held.slots[path].original
    top = held.placed[here[0]][path]
    for name in here[1:]:
        module = held.placed[name][path]
        if getattr(module, "READS_WEIGHT", False):
            raise UnsupportedError(
                f"adapter {name!r} ({held.metas[name].method}) reads the weight below it at {path}, "
                f"where {', '.join(here[: here.index(name)])} would stand: put it first in the stack"
            )
        # the arrays are shared; the original keeps standing on the base, for when it is active alone
        module = copy.copy(module)
        module.base = top
        top = module
    return top


def _mixed(held: _Several, path: str, choices: list[Choice]) -> nn.Module | None:
    """What stands at `path` when row i uses `choices[i]`."""
    each = {choice: _stacked(held, path, choice) for choice in choices}
    modules = [each[choice] for choice in choices]
    if all(module is modules[0] for module in modules):
        return modules[0]
    mixed = Rows([module for module in modules if module is not None])
    mixed.freeze()
    return mixed


def _put(held: _Several, model: nn.Module, tree: dict[str, nn.Module | None]) -> None:
    for path, module in tree.items():
        if module is not None and module.training != model.training:
            module.train(model.training)  # while it was out of the tree, train() and eval() passed it by
        held.slots[path].put(module)


def _take(held: _Several, model: nn.Module, name: str, placed: dict[str, nn.Module]) -> None:
    """Keep a built adapter: frozen, with its places and what of it can train."""
    held.placed[name] = placed
    held.trainable[name] = [
        (module, keys)
        for top in placed.values()
        for module in top.modules()
        if (
            keys := [
                key for key, value in module.trainable_parameters().items() if isinstance(value, mx.array)
            ]
        )
    ]
    present = {path for path, _ in model.named_modules()}
    for path, module in placed.items():
        module.freeze()
        if path not in held.slots:
            held.slots[path] = _slot(model, path) if path in present else _Slot(model, path, None)


def _slot(model: nn.Module, path: str) -> _Slot:
    parent: Any = model
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        parent = parent[part]
    return _Slot(parent, last, parent[last])


def _forget(held: _Several, name: str) -> None:
    for part in (held.metas, held.placed, held.trainable):
        part.pop(name, None)
    for path in [p for p in held.slots if not any(p in placed for placed in held.placed.values())]:
        held.slots[path].put(held.slots[path].original)
        del held.slots[path]
