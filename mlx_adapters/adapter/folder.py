"""Write an adapter folder, and read one onto a model.

An adapter folder is already what PEFT reads, so PyTorch opens it as it stands:

    adapter_config.json        PEFT's configuration
    adapter_model.safetensors  PEFT's tensor names and layout, float32
    mlx_adapters.json          ours: the method's options, base model, prompt template, how it was trained
    seen.txt                   hashes of the training questions, one per line: eval tells seen items apart
    chat_template.jinja        where it was trained with a chat template that is not the tokenizer's own

A folder without the last three (one that PEFT wrote) loads as well.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from operator import lt
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters import __version__
from mlx_adapters.adapter.completeness import Model, check_tensors, without_towers
from mlx_adapters.adapter.from_mlx_lm import as_peft_tensors, is_mlx_lm
from mlx_adapters.adapter.located import located
from mlx_adapters.adapter.meta import AdapterMeta, read_meta
from mlx_adapters.adapter.peft_names import scaled_inputs, sized, with_fields
from mlx_adapters.adapter.reading import (
    CONFIG,
    META,
    PREFIX,
    SEEN,
    WEIGHTS,
    by_layer,
    read_fields,
    read_tensors,
    weights_file,
)
from mlx_adapters.adapter.translate import Written, inward, outward
from mlx_adapters.adapter.tree import adapter_set, attached, layers
from mlx_adapters.errors import AdapterError, counted, reading, writing_to
from mlx_adapters.files.writing import write_whole
from mlx_adapters.methods.base import AdapterLayer, Member, Method, Placed, short_names
from mlx_adapters.methods.beside import WithModules, listed
from mlx_adapters.methods.experts import completed, in_model
from mlx_adapters.methods.ia3 import IA3
from mlx_adapters.methods.lora import LoRA
from mlx_adapters.methods.low_rank import LowRank
from mlx_adapters.methods.tied import HEAD, HeadUpdate, TiedToSave
from mlx_adapters.models import sites
from mlx_adapters.models.architectures.table import architecture
from mlx_adapters.models.load import LanguageModel
from mlx_adapters.models.names import as_record, from_record
from mlx_adapters.models.torch_tree import TorchTree, tree_of

__all__ = [
    "build",
    "load_weights",
    "named_tensors",
    "own_tensors",
    "peft_config",
    "place",
    "save",
    "tensors",
    "write",
]


def save(
    model: LanguageModel | nn.Module,
    folder: str | Path,
    *,
    meta: AdapterMeta | None = None,
    base: str | None = None,
) -> None:
    """Write the adapter of a model to an adapter folder, which PEFT opens as it stands.

    Each file is written beside and renamed, the weights last.

    Args:
        model: A model that carries an adapter. Of several adapters loaded by name, one is active.
        folder: Where to write. What is there is replaced.
        meta: What to say of the adapter; by default what is known from `attach` or `load`.
        base: The hub id or the path that PyTorch users load the base from.

    Raises:
        AdapterError: The model carries no adapter, or not the one that `meta` describes.
        OutputError: The folder cannot be written.
    """
    folder, network = Path(folder), model.model if isinstance(model, LanguageModel) else model
    by_name, single = _active(network), attached(network)
    known = by_name[1] if by_name else single.meta if single else None
    meta = meta or known
    if meta is None:
        raise AdapterError("the model carries no adapter: attach one first")
    if by_name and by_name[1].method != meta.method:
        name, other = by_name[0], by_name[1].method.NAME
        raise AdapterError(f"{folder}: the active adapter is {name!r} ({other}), not what meta says")
    if base is not None:
        meta = replace(meta, base={**meta.base, "_name_or_path": base})
    written = _written(layers(network), network, meta)
    meta.method.save_extra(folder, layers(network))
    meta = replace(meta, method=meta.method.as_saved(), names={})
    fields = peft_config(network, meta)
    if written.moved:
        tree = tree_of(network, meta.base["model_type"])
        linear = [path.removesuffix(".base") for path in sites.linears(network)]
        told = with_fields(fields, written, tree, linear)
        if told.get("rank_pattern") and "rank_pattern" not in (meta.method.PEFT_FIELDS or {}):
            raise AdapterError(
                f"{meta.method.NAME} on parts of {next(iter(told['rank_pattern']))}, which is one layer in "
                "PyTorch, would need a rank of its own there: adapt that with lora"
            )
        meta, fields = replace(meta, names=_names(written, tree, told)), told
    write(folder, _named(written, layers(network)), fields=fields, meta=meta)


def _active(model: nn.Module) -> tuple[str, AdapterMeta] | None:
    """The active one of the adapters loaded by name; None where the model holds none by name."""
    loaded = adapter_set(model)
    if loaded is None:
        return None
    if len(loaded.active) != 1:
        raise AdapterError(
            f"{len(loaded.active) or 'none'} of the model's adapters {', '.join(loaded.metas)} are active: "
            "activate one of them by name first"
        )
    return loaded.active[0], loaded.metas[loaded.active[0]]


def _written(placed: Mapping[str, nn.Module], model: nn.Module, meta: AdapterMeta) -> Written:
    """The tensors of adapter layers by the modules that PyTorch has."""
    groups = {
        path: {s: array for s, array in _by_suffix(layer).items() if not s.startswith(PREFIX)}
        for path, layer in placed.items()
        if isinstance(layer, AdapterLayer) and not layer.ROOTED
    }
    at = getattr(meta.method.as_saved(), "at", None)
    return outward(groups, tree_of(model, meta.base["model_type"]), at)


def _named(written: Written, placed: Mapping[str, nn.Module]) -> dict[str, mx.array]:
    """The tensors under their names in a file, with those that have no module."""
    named = {
        f"{PREFIX}{module}.{suffix}": array
        for module, group in written.groups.items()
        for suffix, array in group.items()
    }
    for layer in placed.values():
        if isinstance(layer, AdapterLayer):
            own = _by_suffix(layer).items()
            named |= {name: array for name, array in own if layer.ROOTED or name.startswith(PREFIX)}
            named |= {name: layer[attribute] for attribute, name in layer.SHARED.items()}
    return named


_TOLD = ("rank_pattern", "alpha_pattern", "modules_to_save")


def _by_suffix(layer: AdapterLayer) -> dict[str, mx.array]:
    """The tensors of a layer by the ends of their names, or by whole names."""
    return {layer.TENSORS[name]: array for name, array in layer.tensors().items()}


def _names(written: Written, tree: TorchTree, fields: dict[str, Any]) -> dict[str, Any]:
    """What must be known to read the file without its base."""
    told = {
        name: fields[name] for name in ("rank_pattern", "alpha_pattern", "modules_to_save") if name in fields
    }
    record = as_record(tree.names) if tree.names else {}
    return {"tensors": record, "paths": sorted(written.moved), "peft": told}


def own_tensors(
    folder: Path, meta: AdapterMeta, model_type: str, model: nn.Module | None = None
) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors of an adapter folder by the names of the modules here, and {path: module of PyTorch} of
    those that PyTorch has otherwise; `model` knows that too where the folder does not."""
    arrays = read_tensors(folder)
    if is_mlx_lm(folder):
        return as_peft_tensors(arrays, model_type, weights_file(folder)), {}
    if record := meta.names.get("tensors"):
        tree = TorchTree(from_record(record), model_type)
    elif model is not None:
        tree = tree_of(model, model_type)
    else:
        return arrays, {}
    with reading(weights_file(folder), AdapterError):
        return inward(
            arrays,
            tree,
            at=meta.method.at if meta.names and isinstance(meta.method, LowRank) else None,
            only=meta.names.get("paths"),
        )


def tensors(model: nn.Module, model_type: str) -> dict[str, mx.array]:
    """The adapter's arrays under PEFT's names."""
    _active(model)
    return named_tensors(layers(model), model_type)


def named_tensors(placed: Mapping[str, nn.Module], model_type: str) -> dict[str, mx.array]:
    """The arrays of the adapter layers among `placed`, under PEFT's names."""
    named = {}
    for path, layer in placed.items():
        if not isinstance(layer, AdapterLayer):
            continue
        for attribute, array in layer.tensors().items():
            named[_key(path, layer, layer.TENSORS[attribute], model_type)] = array
        for attribute, name in layer.SHARED.items():
            named[name] = layer[attribute]
    return named


def _key(path: str, layer: AdapterLayer, suffix: str, model_type: str) -> str:
    rooted = layer.ROOTED or suffix.startswith(PREFIX)
    return suffix if rooted else f"{PREFIX}{sites.to_hf(path, model_type)}.{suffix}"


def peft_config(model: nn.Module, meta: AdapterMeta) -> dict[str, Any]:
    """The `adapter_config.json` that PEFT reads."""
    method, model_type = meta.method, meta.base["model_type"]
    fields = method.to_peft()
    if "fan_in_fan_out" in fields:
        fields["fan_in_fan_out"] = architecture(model_type).conv1d
    return {
        "peft_type": method.PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": meta.base.get("_name_or_path") or meta.base.get("path", ""),
        **({"revision": revision} if (revision := meta.base.get("revision")) else {}),
        "inference_mode": True,
        **_target_modules(model, model_type),
        **fields,
        **method.peft_extra(layers(model), model, model_type),
    }


def _target_modules(model: nn.Module, model_type: str) -> dict[str, list[str]]:
    targets = {path: layer for path, layer in layers(model).items() if layer.TARGET and not layer.ROOTED}
    called = {layer.CALLED for layer in targets.values() if layer.CALLED}
    names = short_names({p for p, layer in targets.items() if not layer.CALLED}, model, model_type)
    return {"target_modules": sorted({*names.values(), *called})} if targets else {}


def write(folder: Path, arrays: dict[str, mx.array], *, fields: dict[str, Any], meta: AdapterMeta) -> None:
    """Write an adapter folder from its parts: the tensors, and the `fields` of `adapter_config.json`."""
    about = {
        "mlx_adapters": __version__,
        "method": meta.method.NAME,
        "config": asdict(meta.method),
        "base": meta.base,
        "template": meta.template,
        "loss_on": meta.loss_on,
        "training": meta.training,
        **({"names": meta.names} if meta.names else {}),
        **({"chat": chat} if (chat := meta.chat.record()) else {}),
    }
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        meta.chat.store(folder)
        _write(folder, arrays, fields, about, meta.seen)


def _write(
    folder: Path, arrays: dict[str, mx.array], fields: dict[str, Any], about: dict[str, Any], seen: list[str]
) -> None:
    temporary = folder / ".adapter_model.tmp.safetensors"
    try:
        with writing_to(folder / WEIGHTS):  # by far the largest
            mx.save_safetensors(str(temporary), arrays, metadata={"format": "pt"})
        write_whole(folder / CONFIG, json.dumps(fields, indent=2) + "\n")
        write_whole(folder / META, json.dumps(about, indent=2) + "\n")
        write_whole(folder / SEEN, "".join(f"{item}\n" for item in seen))
        temporary.replace(folder / WEIGHTS)
    finally:
        temporary.unlink(missing_ok=True)


def build(model: nn.Module, model_type: str, folder: str | Path, *, name: str) -> tuple[AdapterMeta, Placed]:
    """Build the layers of the adapter in `folder` and load their weights, by module path. Freezes `model`,
    installs nothing. `name` is what errors call the model."""
    folder = located(folder)
    with reading(folder, AdapterError):
        return _build(model, model_type, folder, name)


def _build(model: nn.Module, model_type: str, folder: Path, name: str) -> tuple[AdapterMeta, Placed]:
    meta = read_meta(folder)
    trained_on = meta.base.get("model_type", model_type)
    if trained_on != model_type:
        raise AdapterError(
            f"{folder}: was trained on a {trained_on} model, but {name} is a {model_type} model"
        )
    arrays, moved = own_tensors(folder, meta, model_type, model)
    fields = {} if is_mlx_lm(folder) else read_fields(folder)
    # a method written here keeps its fields as they are
    from_torch = bool(fields) and not (folder / META).exists()
    if moved and from_torch and isinstance(meta.method, LowRank):
        meta = replace(meta, method=sized(meta.method, fields, arrays, moved, model_type))
    if moved and from_torch and isinstance(meta.method, IA3):
        meta = replace(meta, method=scaled_inputs(meta.method, moved, model_type))
    method = meta.method.load_extra(folder)
    grouped, shared = by_layer(arrays, type(method), model_type, folder)
    grouped = in_model(without_towers(grouped, model_type, folder), model, model_type)
    if (untied := _untied(method, fields, grouped)) != method:
        method = untied
        meta = replace(meta, method=method)
    if isinstance(meta.method, LoRA):
        stacks = fields.get("target_parameters") or []
        grouped = completed(grouped, model, model_type, meta.method.at, stacks)
    with reading(weights_file(folder), AdapterError):
        check_tensors(
            grouped,
            Model(model, model_type, name),
            method=method,
            fields=fields if method.PEFT_FIELDS is not None else {},
            from_torch=from_torch,
        )
    model.freeze()
    # biases that train by themselves are wherever the base has one
    paths = [path for path, own in grouped.items() if path and own.keys() != {"bias"}]
    placed = place(method, model, model_type, paths or None)
    for path, layer in placed.items():
        if not isinstance(layer, AdapterLayer):
            continue
        own = grouped.pop("" if layer.ROOTED else path, {})
        if isinstance(layer, HeadUpdate | TiedToSave):
            own |= {f"head_{name}": array for name, array in grouped.pop(HEAD, {}).items()}
        load_weights(layer, own, path, folder, name)
        for attribute, tensor in layer.SHARED.items():
            if tensor not in shared:
                raise AdapterError(f"{weights_file(folder)}: {tensor} is missing, which all its layers share")
            if any(map(lt, shared[tensor].shape, layer[attribute].shape)):
                size = f"{list(shared[tensor].shape)} is smaller than {list(layer[attribute].shape)}"
                raise AdapterError(f"{weights_file(folder)}: {tensor} {size}, which its layers need")
            layer[attribute] = shared[tensor]
    if grouped:
        raise AdapterError(
            f"{weights_file(folder)}: has {counted(len(grouped), 'layer')} that {method.NAME} does not "
            f"target here, e.g. {next(iter(grouped))}"
        )
    mx.eval([module.parameters() for module in placed.values()])
    return meta, placed


def _untied(method: Method, fields: dict[str, Any], grouped: dict[str, dict[str, mx.array]]) -> Method:
    """With PEFT's `ensure_weight_tying` one trained matrix stands in the file as embedding and as head, and
    its configuration may name only one of them: here the two are trained, each its own."""
    if not fields.get("ensure_weight_tying") or not isinstance(method, WithModules):
        return method
    names = listed(method.modules_to_save)
    if not names or HEAD in names or "weight" not in grouped.get(HEAD, {}):
        return method
    return replace(method, modules_to_save=",".join([*names, HEAD]))


def place(method: Method, model: nn.Module, model_type: str, paths: list[str] | None = None) -> Placed:
    """What the method puts where; the adapters that it is made of are read first."""
    if not (folders := method.members()):
        return method.place(model, model_type, paths)
    return method.place_members(model, [_member(model, model_type, folder) for folder in folders])


def _member(model: nn.Module, model_type: str, folder: Path) -> Member:
    meta, placed = build(model, model_type, folder, name=f"this {model_type} model")
    fields = read_fields(folder)

    def save(target: Path) -> None:
        write(target, _named(_written(placed, model, meta), placed), fields=fields, meta=meta)

    return Member(folder, meta.method, placed, save)


def load_weights(
    layer: AdapterLayer, arrays: dict[str, mx.array], path: str, folder: Path, base: str
) -> None:
    """Give `layer` at `path` the arrays read from `folder`; AdapterError for a name or a shape that does not
    fit. `base` names the model in the message."""
    own, arrays = layer.tensors(), layer.accept(arrays)
    if missing := sorted(set(own) - set(arrays)):
        names = ", ".join(layer.TENSORS[name] for name in missing)
        raise AdapterError(f"{weights_file(folder)}: {path} has no {names}")
    if strange := sorted(set(arrays) - set(own)):
        names = ", ".join(layer.TENSORS.get(name, name) for name in strange)
        raise AdapterError(f"{weights_file(folder)}: {path} has {names}, which its configuration does not")
    for name, array in arrays.items():
        if array.shape != own[name].shape:
            raise AdapterError(
                f"{weights_file(folder)}: {path}.{layer.TENSORS[name]} has shape {list(array.shape)}, but "
                f"{base} needs {list(own[name].shape)}: this adapter belongs to another model"
            )
    layer.load_weights({name: array.astype(mx.float32) for name, array in arrays.items()})
