"""Adapter folders as if they had been trained: every array is moved away from its start."""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_adapters import adapter, methods
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.models import load as model


def make_adapter(base: Path, folder: Path, method: str, fields: dict[str, Any], seed: int) -> Path:
    """Write the adapter of `method` for the model in `base` to `folder`, and return that."""
    loaded = model.load(base)
    config = methods.make(method, fields)
    mx.random.seed(seed)
    about = model.describe(loaded)
    adapter.attach(loaded, config)
    for path, array in tree_flatten(loaded.model.trainable_parameters()):
        moved = tree_unflatten([(path, array + 0.1 * mx.random.normal(array.shape))])
        loaded.model.update(moved, strict=False)
    adapter.save(loaded.model, folder, meta=AdapterMeta(method=config, base=about))
    return folder
