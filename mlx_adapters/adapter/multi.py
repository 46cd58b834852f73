"""Several adapters on one base: loaded by name, switched at run time, stacked, or one per row of a batch.

    load_adapters(loaded, {"math": folder, "chat": other})   nothing is active yet: the base answers
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
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters import adapter
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.adapter.located import short_name
from mlx_adapters.adapter.other_base import say_other_base
from mlx_adapters.adapter.tree import AdapterSet, Choice, adapter_set, slots_of
from mlx_adapters.errors import AdapterError, AdaptersError, ConfigError, UnsupportedError, unknown
from mlx_adapters.methods.base import AdapterLayer
from mlx_adapters.models.load import LanguageModel, describe, load

__all__ = ["activate", "active", "load_adapters", "load_named", "names", "rows", "unload"]


def load_adapters(loaded: LanguageModel, folders: Mapping[str, Path | str]) -> dict[str, AdapterMeta]:
    """Load adapter folders or hub ids by name, beside those already loaded; the active one stays active.

    All of them or, when one raises AdapterError, none.
    """
    model = loaded.model
    adapters = adapter_set(model) or AdapterSet()
    if adapters.mixing:
        raise AdapterError("adapters cannot be loaded inside `with rows(...)`")
    for name in folders:
        if not name or name in adapters.metas:
            raise AdapterError(f"adapter name {name!r} is {'taken' if name else 'empty'}: choose another")
    if not adapters.metas and adapter.layers(model):
        raise AdapterError("the model carries an adapter already: detach it first")
    before, trains = adapters.active, adapters.trains
    if adapters.metas:
        activate(model, None)  # an adapter is built on the bare base
    done: dict[str, AdapterMeta] = {}
    try:
        for name, folder in folders.items():
            meta, placed = adapter.build(model, loaded.config["model_type"], folder, name=str(loaded.path))
            say_other_base(folder, meta, loaded)
            _add(adapters, model, name, placed)
            done[name] = adapters.metas[name] = replace(meta, base={**describe(loaded), **meta.base})
    except AdaptersError:
        for name in done:
            _remove(adapters, name)
        raise
    finally:
        if adapters.metas:
            model.adapter_set = adapters
            activate(model, before, train=trains)
    return done


def load_named(
    source: str, adapters: Sequence[str], *, base: str
) -> tuple[LanguageModel, dict[str, AdapterMeta]]:
    """The model, with the adapters of `NAME=FOLDER`, or of a `FOLDER` or hub id that gives its name.

    Raises ConfigError where two of them, or the `base`, would have one name.
    """
    folders: dict[str, Path | str] = {}
    for text in adapters:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).is_dir():
            name, folder = short_name(text), text
        if not name or not folder:
            raise ConfigError(f"--adapter {text}: give NAME=FOLDER")
        if name in folders or name == base:
            raise ConfigError(f"two models would be named {name}: give --adapter OTHERNAME={folder}")
        folders[name] = folder
    loaded = load(source, answering=True)
    return loaded, load_adapters(loaded, folders) if folders else {}


def names(model: nn.Module) -> list[str]:
    """The adapters loaded by name, in that order."""
    adapters = adapter_set(model)
    return list(adapters.metas) if adapters else []


def active(model: nn.Module) -> tuple[str, ...]:
    """The active adapters, the lowest of a stack first; empty when the base answers."""
    adapters = adapter_set(model)
    return adapters.active if adapters else ()


def activate(model: nn.Module, which: str | Sequence[str] | None, *, train: bool = False) -> None:
    """Make one adapter answer, several as a stack, or with None the base.

    Nothing trains afterwards, or with `train` that one adapter does. Raises AdapterError for a name that is
    not loaded, UnsupportedError for adapters that do not stack.
    """
    adapters = _adapters_of(model)
    if adapters.mixing:
        raise AdapterError("adapters cannot be switched inside `with rows(...)`")
    choice = _choice(adapters, which)
    if train and len(choice) != 1:
        raise UnsupportedError(
            f"{len(choice)} adapters cannot train at once: activate one by name to train it"
        )
    tree = {path: _stacked(adapters, path, choice) for path in adapters.slots}
    if adapters.trains:
        for module in adapters.placed[adapters.active[0]].values():
            module.freeze()
    _install(adapters, model, tree)
    adapters.active, adapters.trains = choice, train
    if train:
        for module, keys in adapters.trainable[choice[0]]:
            module.unfreeze(recurse=False, keys=keys)


@contextmanager
def rows(model: nn.Module, which: Sequence[str | Sequence[str] | None]) -> Iterator[None]:
    """Inside, the rows of a batch use different adapters: `which` says for each row what `activate` takes.

    Every batch must have `len(which)` rows. Nothing trains. Adapters on the prompt change the number of
    tokens and the cache of a whole batch, those on whole blocks share its cache: UnsupportedError where rows
    differ and one of them has such.
    """
    adapters = _adapters_of(model)
    if adapters.mixing:
        raise AdapterError("`with rows(...)` cannot be nested")
    choices = [_choice(adapters, row) for row in which]
    if not choices:
        raise AdapterError("rows(...) is empty: name an adapter or None for each row of the batch")
    before, trains = adapters.active, adapters.trains
    mixed = {name for choice in choices for name in choice} if len(set(choices)) > 1 else set()
    if found := [name for name in adapters.metas if name in mixed and not _rowwise(adapters, name)]:
        raise UnsupportedError(
            f"{_called(adapters, found[0])} stands on whole blocks, which run once "
            "for all rows of a batch. Run its rows in a batch of their own"
        )
    if found := _on_prompt(adapters, mixed):
        raise UnsupportedError(
            f"{_called(adapters, found[0])} puts virtual tokens before the text: in a "
            "batch every row would have to have them. Run its rows in a batch of their own"
        )
    activate(model, choices[0] if len(set(choices)) == 1 else None)
    try:
        _install(adapters, model, {path: _mixed(adapters, path, choices) for path in adapters.slots})
        adapters.mixing = True
        yield
    finally:
        adapters.mixing = False
        activate(model, before, train=trains)


def unload(model: nn.Module, name: str) -> None:
    """Forget an adapter and free its arrays. Raises AdapterError while it is active."""
    adapters = _adapters_of(model)
    _choice(adapters, name)
    if adapters.mixing or name in adapters.active:
        raise AdapterError(f"adapter {name!r} is active: activate another one or None before unloading it")
    _remove(adapters, name)
    if not adapters.metas:
        del model.adapter_set


class Rows(nn.Module):
    """Sends each row of x [rows, ...] through the module of its adapter."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        different = {id(module): module for module in modules}
        groups = [[i for i, module in enumerate(modules) if id(module) == key] for key in different]
        self.branches = list(different.values())
        self.split = _Split(groups)

    def __call__(self, *inputs: mx.array) -> mx.array:
        """`inputs` are x, and for a mixture of experts also which of them each token goes to."""
        if inputs[0].shape[0] != self.split.count:
            raise AdapterError(
                f"the batch has {inputs[0].shape[0]} rows, but rows(...) named adapters for "
                f"{self.split.count}"
            )
        parts = [
            branch(*(array[index] for array in inputs))
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


def _adapters_of(model: nn.Module) -> AdapterSet:
    adapters = adapter_set(model)
    if adapters is None:
        raise AdapterError("the model holds no adapters by name: load them with multi.load_adapters")
    return adapters


def _choice(adapters: AdapterSet, which: str | Sequence[str] | None) -> Choice:
    choice = (which,) if isinstance(which, str) else tuple(which or ())
    for name in choice:
        if name not in adapters.metas:
            raise AdapterError(unknown("adapter", str(name), adapters.metas))
    if len(set(choice)) < len(choice):
        raise AdapterError(f"the stack {', '.join(choice)} names an adapter twice")
    if len(on_prompt := _on_prompt(adapters, choice)) > 1:
        raise UnsupportedError(
            f"adapters {' and '.join(map(repr, on_prompt))} both put virtual tokens before the text: "
            "a stack can have one of that kind"
        )
    return choice


def _called(adapters: AdapterSet, name: str) -> str:
    return f"adapter {name!r} ({adapters.metas[name].method.NAME})"


def _rowwise(adapters: AdapterSet, name: str) -> bool:
    layers = (module for module in adapters.placed[name].values() if isinstance(module, AdapterLayer))
    return all(layer.ROWWISE for layer in layers)


def _on_prompt(adapters: AdapterSet, among: set[str] | Choice) -> list[str]:
    """The adapters that act on the prompt."""
    return [
        name
        for name in adapters.metas
        if name in among
        and any(
            type(module).virtual_ids is not AdapterLayer.virtual_ids
            or type(module).start_cache is not AdapterLayer.start_cache
            for module in adapters.placed[name].values()
            if isinstance(module, AdapterLayer)
        )
    ]


def _stacked(adapters: AdapterSet, path: str, choice: Choice) -> nn.Module | None:
    """What stands at `path` when `choice` is active."""
    here = [name for name in choice if path in adapters.placed[name]]
    if not here:
        return adapters.slots[path].original
    top = adapters.placed[here[0]][path]
    for name in here[1:]:
        module = adapters.placed[name][path]
        if getattr(module, "READS_WEIGHT", False):
            raise UnsupportedError(
                f"{_called(adapters, name)} reads the weight below it at {path}, "
                f"where {', '.join(here[: here.index(name)])} would stand: put it first in the stack"
            )
        # the arrays are shared; the original keeps standing on the base, for when it is active alone
        module = copy.copy(module)
        module.base = top
        top = module
    return top


def _mixed(adapters: AdapterSet, path: str, choices: list[Choice]) -> nn.Module | None:
    """What stands at `path` when row i uses `choices[i]`."""
    each = {choice: _stacked(adapters, path, choice) for choice in choices}
    modules = [each[choice] for choice in choices]
    if all(module is modules[0] for module in modules):
        return modules[0]
    mixed = Rows([module for module in modules if module is not None])
    mixed.freeze()
    return mixed


def _install(adapters: AdapterSet, model: nn.Module, tree: dict[str, nn.Module | None]) -> None:
    for path, module in tree.items():
        if module is not None and module.training != model.training:
            module.train(model.training)  # while it was out of the tree, train() and eval() passed it by
        adapters.slots[path].put(module)


def _add(adapters: AdapterSet, model: nn.Module, name: str, placed: dict[str, nn.Module]) -> None:
    """Keep a built adapter: frozen, with its places and what of it can train."""
    adapters.placed[name] = placed
    adapters.trainable[name] = [
        (module, keys)
        for top in placed.values()
        for module in top.modules()
        if (
            keys := [
                key for key, value in module.trainable_parameters().items() if isinstance(value, mx.array)
            ]
        )
    ]
    adapters.slots |= slots_of(model, placed.keys() - adapters.slots.keys())
    for module in placed.values():
        module.freeze()


def _remove(adapters: AdapterSet, name: str) -> None:
    for part in (adapters.metas, adapters.placed, adapters.trainable):
        part.pop(name, None)
    for path in [p for p in adapters.slots if not any(p in placed for placed in adapters.placed.values())]:
        adapters.slots[path].put(adapters.slots[path].original)
        del adapters.slots[path]
