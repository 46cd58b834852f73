"""A tiny model with an adapter on it, its logits, and how far they may be from others."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from cases import Method
from mlx.utils import tree_flatten, tree_unflatten
from tiny import make_tiny

from mlx_adapters import adapter, methods
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.adapter.call import call_model
from mlx_adapters.models import load as model

IDS = mx.array([[4, 5, 6, 7, 8, 9, 10, 11], [11, 10, 9, 8, 7, 6, 5, 4]])


def attached(folder: Path, method: Method, *, trained: bool) -> tuple[model.LanguageModel, AdapterMeta]:
    loaded = model.load(folder)
    config = methods.make(method.name, method.settings(folder))
    base = model.describe(loaded)
    mx.random.seed(3)
    adapter.attach(loaded, config)
    if trained:
        change(loaded.model)
    loaded.model.eval()
    return loaded, AdapterMeta(method=config, base=base, template="plain")


def change(network: nn.Module) -> None:
    """Move every adapter array away from its start, as training would."""
    for path, array in tree_flatten(network.trainable_parameters()):
        network.update(nested(path, array + 0.1 * mx.random.normal(array.shape)), strict=False)


def nested(path: str, array: mx.array) -> Any:
    return tree_unflatten([(path, array)])


def logits(loaded: model.LanguageModel) -> np.ndarray:
    return np.array(call_model(loaded.model, IDS))


def bound(expected: np.ndarray) -> float:
    return float(1e-5 + 1e-5 * np.abs(expected).max())


def tiny_llama_with(method: str, tmp_path: Path) -> model.LanguageModel:
    """A tiny model with an adapter that does something."""
    loaded = model.load(make_tiny("llama", tmp_path))
    config = methods.make(method, {} if method == "lora" else {"num_virtual_tokens": 3})
    adapter.attach(loaded, config)
    shaken = [(name, array + 0.3 * mx.random.normal(array.shape, key=mx.random.key(7)))
              for name, array in tree_flatten(loaded.model.trainable_parameters())]  # fmt: skip
    loaded.model.load_weights(shaken, strict=False)
    return loaded
