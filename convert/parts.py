"""An adapter folder taken apart for another format, and an adapter folder put together from its parts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_adapters import adapter
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.adapter.from_mlx_lm import refuse_mlx_lm
from mlx_adapters.errors import AdapterError
from mlx_adapters.methods.base import Method
from mlx_adapters.models.load import LanguageModel, describe

__all__ = ["Parts", "assemble", "need", "take_apart"]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """`arrays` holds {MLX path: {attribute of the layer: array}}."""

    meta: AdapterMeta
    arrays: dict[str, dict[str, mx.array]]
    model_type: str


def take_apart(source: Path) -> Parts:
    """Read one of our folders. AdapterError where it does not say what kind of model it is for."""
    refuse_mlx_lm(source)
    meta = adapter.read_meta(source)
    model_type = meta.base.get("model_type")
    if not model_type:
        raise AdapterError(
            f"{source}: does not say which architecture it was trained on, and names differ between them. "
            "Import it first: mlx-adapters import SRC DST --model MODEL"
        )
    own, _ = adapter.own_tensors(source, meta, model_type)
    arrays, _ = adapter.by_layer(own, type(meta.method), model_type, source)
    return Parts(meta=meta, arrays=arrays, model_type=model_type)


def assemble(
    loaded: LanguageModel,
    method: Method,
    arrays: dict[str, dict[str, mx.array]],
    *,
    dst: Path,
    source: Path,
    **about: Any,
) -> AdapterMeta:
    """Attach `arrays` to the model they are for, which checks every name and shape, and save that to `dst`.

    `about` are fields of AdapterMeta that the other format knows.
    """
    present = {path for path, _ in loaded.model.named_modules()}
    if strange := [path for path in arrays if path not in present]:
        raise AdapterError(f"{source}: {strange[0]} is not in {loaded.path}: this adapter is another model's")
    # biases that train by themselves are wherever the base has one
    adapter.attach(loaded, method, paths=[path for path, own in arrays.items() if own.keys() != {"bias"}])
    layers = adapter.layers(loaded.model)
    if strange := [path for path in arrays if path not in layers]:
        raise AdapterError(f"{source}: {strange[0]} has tensors, which its configuration does not name")
    for path, layer in layers.items():
        adapter.load_weights(layer, arrays.get(path, {}), path, source, str(loaded.path))
    meta = AdapterMeta(method=method, base=describe(loaded), **about)
    adapter.save(loaded.model, dst, meta=meta)
    return meta


def need(condition: bool, source: Path, what: str) -> None:
    """Raise the AdapterError that the other format cannot hold this."""
    if not condition:
        raise AdapterError(f"{source}: {what}")
