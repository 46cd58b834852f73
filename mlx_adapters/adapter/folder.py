"""Attach an adapter to a model, save it, load it.

An adapter folder is already what PEFT reads, so PyTorch opens it as it stands:

    adapter_config.json        PEFT's configuration
    adapter_model.safetensors  PEFT's tensor names and layout, float32
    mlx_adapters.json          ours: method fields, base model, prompt template, how it was trained
    seen.txt                   hashes of the training questions, one a line: eval tells seen items apart

A folder without the last two (one that PEFT wrote) loads as well.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from operator import lt
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_adapters import __version__, methods
from mlx_adapters.adapter.completeness import Model, check_tensors
from mlx_adapters.adapter.reading import (
    CONFIG,
    META,
    PREFIX,
    SEEN,
    WEIGHTS,
    by_layer,
    read_fields,
    read_json,
    read_tensors,
    refuse_links,
)
from mlx_adapters.errors import AdapterError, counted, reading, writing_to
from mlx_adapters.files.writing import write_whole
from mlx_adapters.methods.base import AdapterLayer, dims, short_names
from mlx_adapters.methods.peft_fields import check_fields
from mlx_adapters.models import sites
from mlx_adapters.models.architectures.table import architecture
from mlx_adapters.models.load import LanguageModel, describe
from mlx_adapters.models.origin import is_hub_id

__all__ = [
    "CONFIG",
    "META",
    "SEEN",
    "WEIGHTS",
    "AdapterMeta",
    "attach",
    "build",
    "by_layer",
    "count",
    "fill",
    "layers",
    "load",
    "named_tensors",
    "peft_config",
    "read_fields",
    "read_meta",
    "read_tensors",
    "refuse_links",
    "save",
    "tensors",
    "write",
]


@dataclass(frozen=True)
class AdapterMeta:
    """What is known of an adapter besides its tensors. `template` is empty when PEFT wrote the folder."""

    method: str
    config: dict[str, Any]
    base: dict[str, Any]
    template: str = ""
    loss_on: str = ""
    seen: list[str] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def hub_id(self) -> str | None:
        """The hub id that the base is known by, if there is one."""
        name = self.base.get("_name_or_path")
        return name if isinstance(name, str) and is_hub_id(name) else None


def attach(
    model: nn.Module, method: str, config: Any, *, base: dict[str, Any], paths: list[str] | None = None
) -> list[str]:
    """Freeze `model`, wrap the layers the method's `config` chooses (or those at `paths`), and return their
    paths.

    Afterwards `model.trainable_parameters()` is exactly the adapter. Raises ConfigError when nothing matches.
    """
    _must_be_bare(model)
    model.freeze()
    placed = methods.place(method, model, base["model_type"], config, paths)
    _install(model, placed)
    return [path for path, module in placed.items() if isinstance(module, AdapterLayer)]


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


def tensors(model: nn.Module, model_type: str) -> dict[str, mx.array]:
    """The adapter's arrays under PEFT's names."""
    held = getattr(model, "several", None)
    if held is not None and len(held.active) != 1:
        raise AdapterError(
            f"{len(held.active) or 'none'} of the model's adapters {', '.join(held.metas)} are active: "
            "activate one of them by name first"
        )
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


def peft_config(model: nn.Module, meta: AdapterMeta) -> dict[str, Any]:
    """The `adapter_config.json` that PEFT reads."""
    module = methods.get(meta.method)
    fields = module.to_peft(module.Config(**meta.config))
    if "fan_in_fan_out" in fields:
        fields["fan_in_fan_out"] = architecture(meta.base["model_type"]).conv1d
    if hasattr(module, "peft_extra"):
        fields |= module.peft_extra(layers(model), model, meta.base["model_type"])
    return {
        "peft_type": module.PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": meta.base.get("_name_or_path") or meta.base.get("path", ""),
        **({"revision": revision} if (revision := meta.base.get("revision")) else {}),
        "inference_mode": True,
        **_target_modules(model, meta.base["model_type"]),
        **fields,
    }


def save(folder: Path, model: nn.Module, *, meta: AdapterMeta) -> None:
    """Write the adapter folder; each file is written beside and renamed, the weights last."""
    arrays = tensors(model, meta.base["model_type"])
    held = getattr(model, "several", None)
    if held is not None and (own := held.metas[held.active[0]]).config != meta.config:
        raise AdapterError(
            f"{folder}: the active adapter is {held.active[0]!r} ({own.method}), not what meta says"
        )
    module = methods.get(meta.method)
    if hasattr(module, "as_saved"):
        meta = replace(meta, config=vars(module.as_saved(module.Config(**meta.config))))
    if hasattr(module, "keep"):
        module.keep(folder, layers(model))
    write(folder, arrays, fields=peft_config(model, meta), meta=meta)


def write(folder: Path, arrays: dict[str, mx.array], *, fields: dict[str, Any], meta: AdapterMeta) -> None:
    """Write an adapter folder from its parts: the tensors, and the `fields` of `adapter_config.json`."""
    about = {"mlx_adapters": __version__, **asdict(meta)}
    seen = about.pop("seen")
    with writing_to(folder):
        _write(folder, arrays, fields, about, seen)


def _write(
    folder: Path, arrays: dict[str, mx.array], fields: dict[str, Any], about: dict[str, Any], seen: list[str]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
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


def read_meta(folder: Path) -> AdapterMeta:
    """What an adapter folder says of itself. Raises AdapterError naming the file and the field."""
    fields = read_fields(folder)
    if not isinstance(fields.get("peft_type"), str):
        raise AdapterError(f"{folder / CONFIG}: field 'peft_type' is missing, so the method is unknown")
    with reading(folder / CONFIG, AdapterError):
        method = methods.by_peft_fields(fields)
        module = methods.get(method)
        if hasattr(module, "PEFT_FIELDS"):
            check_fields(fields, module.PEFT_FIELDS)
        config = module.from_peft(fields)
    if not (folder / META).exists():
        name = fields.get("base_model_name_or_path")
        return AdapterMeta(method=method, config=asdict(config), base={"_name_or_path": name} if name else {})
    about = read_json(folder / META, "")
    about.pop("mlx_adapters", None)
    if about.get("method") != method:
        raise AdapterError(
            f"{folder / CONFIG}: describes {method} (peft_type, use_dora), but {META} says "
            f"{about.get('method')}: one of the two was changed"
        )
    with reading(folder / META, AdapterError):
        _must_agree(fields, module.to_peft(module.Config(**about["config"])), folder)
    # an adapter made of others keeps theirs below: what they have seen, it has seen
    seen = sorted({item for file in folder.rglob(SEEN) for item in file.read_text().split()})
    with reading(folder / META, AdapterError):
        return AdapterMeta(**about, seen=seen)


# What PyTorch computes with: the file it reads and ours must not say different things.
_COMPUTED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")


def _must_agree(fields: dict[str, Any], ours: dict[str, Any], folder: Path) -> None:
    for name in _COMPUTED:
        if (found := fields.get(name) or None) != (wanted := ours.get(name) or None):
            raise AdapterError(
                f"{folder / CONFIG}: {name} is {found!r}, but by {META} it is {wanted!r}: one of the two was "
                "changed"
            )


def load(loaded: LanguageModel, folder: Path) -> AdapterMeta:
    """Attach the adapter in `folder` to a loaded model.

    Strict: every tensor must find its layer and its shape, and every wrapped layer its tensors. Raises
    AdapterError that lists what does not fit.
    """
    _must_be_bare(loaded.model)
    meta, placed = build(loaded.model, loaded.config["model_type"], folder, name=str(loaded.path))
    _install(loaded.model, placed)
    return AdapterMeta(**{**asdict(meta), "base": {**describe(loaded), **meta.base}})


def build(
    model: nn.Module, model_type: str, folder: Path, *, name: str
) -> tuple[AdapterMeta, dict[str, nn.Module]]:
    """The adapter in `folder` as what its method puts where, filled, for a bare `model` that stays as it is
    but for being frozen. `name` is the model's in errors, which are those of `load`."""
    with reading(folder, AdapterError):
        return _build(model, model_type, folder, name)


def _build(
    model: nn.Module, model_type: str, folder: Path, name: str
) -> tuple[AdapterMeta, dict[str, nn.Module]]:
    meta = read_meta(folder)
    arrays = read_tensors(folder)
    trained_on = meta.base.get("model_type", model_type)
    if trained_on != model_type:
        raise AdapterError(
            f"{folder}: was trained on a {trained_on} model, but {name} is a {model_type} model"
        )
    module = methods.get(meta.method)
    config = module.Config(**meta.config)
    if hasattr(module, "kept"):
        config = module.kept(folder, config)
    grouped, shared = by_layer(arrays, meta.method, model_type, folder)
    with reading(folder / WEIGHTS, AdapterError):
        check_tensors(
            grouped,
            Model(model, model_type, name),
            whole=getattr(config, "modules_to_save", None),
            fields=read_fields(folder) if hasattr(module, "PEFT_FIELDS") else {},
            from_torch=not (folder / META).exists(),
        )
    model.freeze()
    paths = [path for path in grouped if path]
    placed = methods.place(meta.method, model, model_type, config, paths or None)
    for path, layer in placed.items():
        if not isinstance(layer, AdapterLayer):
            continue
        fill(layer, grouped.pop("" if layer.ROOTED else path, {}), path, folder, name)
        for attribute, tensor in layer.SHARED.items():
            if tensor not in shared:
                raise AdapterError(f"{folder / WEIGHTS}: {tensor} is missing, which all its layers share")
            if any(map(lt, shared[tensor].shape, layer[attribute].shape)):
                size = f"{list(shared[tensor].shape)} is smaller than {list(layer[attribute].shape)}"
                raise AdapterError(f"{folder / WEIGHTS}: {tensor} {size}, which its layers need")
            layer[attribute] = shared[tensor]
    if grouped:
        raise AdapterError(
            f"{folder / WEIGHTS}: has {counted(len(grouped), 'layer')} that {meta.method} does not target "
            f"here, e.g. {next(iter(grouped))}"
        )
    mx.eval([module.parameters() for module in placed.values()])
    return meta, placed


def _must_be_bare(model: nn.Module) -> None:
    if layers(model):
        raise AdapterError("the model carries an adapter already: load the base again first")
    if getattr(model, "several", None) is not None:
        raise AdapterError("the model holds adapters by name: add one with several.load_several")


def _install(model: nn.Module, placed: dict[str, nn.Module]) -> None:
    present = {path for path, _ in model.named_modules()}
    # a layer that stands in no other's place (a prefix) is a new attribute of the model
    for path in placed.keys() - present:
        setattr(model, path, placed[path])
    model.update_modules(tree_unflatten([(p, module) for p, module in placed.items() if p in present]))


def _key(path: str, layer: AdapterLayer, suffix: str, model_type: str) -> str:
    return suffix if layer.ROOTED else f"{PREFIX}{sites.to_hf(path, model_type)}.{suffix}"


def fill(layer: AdapterLayer, given: dict[str, mx.array], path: str, folder: Path, base: str) -> None:
    """Give `layer` at `path` the arrays read from `folder`; AdapterError for a name or a shape that does not
    fit. `base` names the model in the message."""
    own, given = layer.tensors(), layer.accept(given)
    if missing := sorted(set(own) - set(given)):
        names = ", ".join(layer.TENSORS[name] for name in missing)
        raise AdapterError(f"{folder / WEIGHTS}: {path} has no {names}")
    if strange := sorted(set(given) - set(own)):
        names = ", ".join(layer.TENSORS.get(name, name) for name in strange)
        raise AdapterError(f"{folder / WEIGHTS}: {path} has {names}, which its configuration does not")
    for name, array in given.items():
        if array.shape != own[name].shape:
            raise AdapterError(
                f"{folder / WEIGHTS}: {path}.{layer.TENSORS[name]} has shape {list(array.shape)}, but "
                f"{base} needs {list(own[name].shape)}: this adapter belongs to another model"
            )
    layer.fill({name: array.astype(mx.float32) for name, array in given.items()})


def _target_modules(model: nn.Module, model_type: str) -> dict[str, list[str]]:
    wrapped = {path for path, layer in layers(model).items() if layer.TARGET and not layer.ROOTED}
    names = short_names(wrapped, model, model_type)
    return {"target_modules": sorted(set(names.values()))} if wrapped else {}
