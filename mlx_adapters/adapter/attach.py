"""Put an adapter on a model, and take it off again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_adapters.adapter.folder import build, place
from mlx_adapters.adapter.meta import AdapterMeta
from mlx_adapters.adapter.other_base import say_other_base
from mlx_adapters.adapter.translate import no_origin
from mlx_adapters.adapter.tree import adapter_set, attached, install, must_be_bare, remove
from mlx_adapters.errors import AdapterError, UnsupportedError
from mlx_adapters.methods.base import AdapterLayer, Method, Placed
from mlx_adapters.models.load import LanguageModel, describe
from mlx_adapters.models.recurrent.install import in_chunks
from mlx_adapters.models.torch_tree import tree_of

__all__ = ["attach", "detach", "load"]


def attach(
    model: LanguageModel | nn.Module,
    method: Method,
    *,
    paths: list[str] | None = None,
    model_type: str | None = None,
) -> dict[str, AdapterLayer]:
    """Freeze a model and put a fresh adapter on it.

    Afterwards `model.trainable_parameters()` is exactly the adapter: train it with any loop, `save` it, and
    `detach` it.

    Args:
        model: What `load` returned, or the bare model of `mlx_lm.load`. A bare model has no tokenizer: a
            prompt that starts from a text needs its `init_ids` then.
        method: The method with its options, as `LoRA(rank=16)`.
        paths: The modules to adapt, by their paths in the model; by default the method's options choose.
        model_type: The architecture's name, for a bare model that does not know it.

    Returns:
        The adapter layers by the path of the module they wrap.

    Raises:
        AdapterError: The model carries an adapter already.
        ConfigError: The options match nothing in this model.
        UnsupportedError: The architecture does not allow the method.
    """
    network = model.model if isinstance(model, LanguageModel) else model
    must_be_bare(network)
    if isinstance(model, LanguageModel):
        base, method = describe(model), method.with_tokenizer(model.tokenizer)
    else:
        base = _described(network, model_type)
    network.freeze()
    in_chunks(network)  # a bare model may come from `mlx_lm.load`
    placed = place(method, network, base["model_type"], paths)
    _must_be_known(network, base["model_type"], placed)
    install(network, placed, AdapterMeta(method=method, base=base))
    return {path: module for path, module in placed.items() if isinstance(module, AdapterLayer)}


def _must_be_known(model: nn.Module, model_type: str, placed: Placed) -> None:
    """AdapterError, before it is trained, for a layer whose adapter could not be written."""
    tree = tree_of(model, model_type)
    for path, layer in placed.items():
        if not isinstance(layer, AdapterLayer) or layer.ROOTED or not layer.TARGET:
            continue
        own = all(suffix.endswith(".experts") for suffix in layer.TENSORS.values())
        if not own and not tree.spots(path):
            raise AdapterError(no_origin(path))


def _described(model: nn.Module, model_type: str | None) -> dict[str, Any]:
    """What an adapter must remember of a base that is known by its module alone."""
    arguments = getattr(model, "args", None)
    name = model_type or getattr(model, "model_type", None) or getattr(arguments, "model_type", None)
    if not isinstance(name, str):
        raise UnsupportedError(f"{type(model).__name__}: does not say its architecture: give model_type")
    sizes = {key: getattr(arguments, key, None) for key in ("hidden_size", "num_hidden_layers", "vocab_size")}
    return {"model_type": name, **{key: size for key, size in sizes.items() if isinstance(size, int)}}


def detach(model: LanguageModel | nn.Module) -> None:
    """Take the adapter off a model. Its own modules stand where they stood; they stay frozen.

    Args:
        model: What `load` returned, or a bare model.

    Raises:
        AdapterError: The model carries no adapter, or holds its adapters by name.
    """
    network = model.model if isinstance(model, LanguageModel) else model
    if adapter_set(network) is not None:
        raise AdapterError("the model holds adapters by name: activate None, or unload them")
    record = attached(network)
    if record is None:
        raise AdapterError("the model carries no adapter: there is nothing to detach")
    remove(network, record)


def load(model: LanguageModel, folder: str | Path) -> AdapterMeta:
    """Attach the adapter in a folder to a loaded model.

    Strict: every tensor must find its layer and its shape, and every wrapped layer its tensors.

    Args:
        model: What `mlx_adapters.models.load.load` returned.
        folder: An adapter folder, ours or PEFT's, or its hub id: `OWNER/NAME`, `OWNER/NAME@REVISION`.

    Returns:
        What the folder says of the adapter.

    Raises:
        AdapterError: Lists what does not fit.
    """
    must_be_bare(model.model)
    meta, placed = build(model.model, model.config["model_type"], folder, name=str(model.path))
    say_other_base(folder, meta, model)
    meta = replace(meta, base={**describe(model), **meta.base})
    install(model.model, placed, meta)
    return meta
