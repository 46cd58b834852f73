"""What works with what, found by trying it on a tiny model of each architecture.

No list says what is supported: every method is placed, run and differentiated, so the table cannot be wrong
about a method, a model file or a version of mlx-lm that came later.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_adapters import adapter, methods
from mlx_adapters.errors import AdaptersError
from mlx_adapters.methods.base import LINEARS
from mlx_adapters.models import sites
from mlx_adapters.models.samples import IDS, architectures, sample, sample_config
from mlx_adapters.virtual import forward

__all__ = ["architectures", "attached", "stands_on", "support", "targets", "trial"]


def support(model_type: str) -> dict[str, str | None]:
    """For each method, why it does not work on `model_type`; None where it does.

    Raises UnsupportedError where no model of that architecture can be built or run here, with the reason.
    Draws from MLX's global random state, and sets it.
    """
    sample(model_type)
    return {name: trial(model_type, name) for name in methods.names()}


def trial(model_type: str, method: str) -> str | None:
    """Why `method`, with its default fields, does not work on `model_type`; None if it does."""
    try:
        network = attached(model_type, method)
        _change(network)
        return _without_gradient(network)
    except AdaptersError as error:
        return str(error)
    except Exception as error:  # of mlx or of a model file: it is what the user would see
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def attached(model_type: str, method: str) -> nn.Module:
    """A tiny `model_type` that carries a fresh adapter of `method` with its default fields."""
    network, base = sample(model_type), sample_config(model_type)
    with tempfile.TemporaryDirectory() as folder:
        config = methods.make_config(method, _fields(method, model_type, base, Path(folder)))
        adapter.attach(network, method, config, base=base)
    return network


def stands_on(method: str) -> str:
    """What the method's layers take the place of, as found on a tiny llama."""
    layers = adapter.layers(attached("llama", method)).values()
    bases = [layer.get("base") for layer in layers]
    kinds: dict[str, tuple[type, ...]] = {
        "linear layers": LINEARS,
        "the embedding": (nn.Embedding, nn.QuantizedEmbedding),
        "norms": (nn.RMSNorm, nn.LayerNorm),
        "the cache": (type(None),),
    }
    return next((kind for kind, types in kinds.items() if all(isinstance(b, types) for b in bases)), "blocks")


def targets(model_type: str) -> dict[str, list[str]]:
    """The default targets of the methods on linear layers, as last parts of paths."""
    row = sites.sites(model_type, sample(model_type))
    return {kind: list(getattr(row, kind)) for kind in ("lora", "series", "parallel", "ia3")}


def _fields(method: str, model_type: str, base: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The fields that a method cannot do without, if it has any."""
    module = methods.get(method)
    if not hasattr(module, "trial_fields"):
        return {}
    fields: dict[str, Any] = module.trial_fields(lambda: sample(model_type), base, folder)
    return fields


def _change(network: nn.Module) -> None:
    """Move the adapter away from its start, where some of its arrays have no gradient yet."""
    network.update(
        tree_map(lambda array: array + 0.05 * mx.random.normal(array.shape), network.trainable_parameters()),
        strict=False,
    )


def _without_gradient(network: nn.Module) -> str | None:
    def loss() -> mx.array:
        out = forward(network, IDS).astype(mx.float32)
        return nn.losses.cross_entropy(out[:, :-1], IDS[:, 1:]).sum()

    value, gradients = nn.value_and_grad(network, loss)()
    sizes: dict[str, Any] = {
        name: mx.abs(gradient).max().item() for name, gradient in tree_flatten(gradients)
    }
    if not all(map(math.isfinite, [value.item(), *sizes.values()])):
        return "the loss or its gradient is not a number"
    lost = [name for name, size in sizes.items() if size == 0]
    return f"no gradient reaches {len(lost)} of {len(sizes)} arrays, e.g. {lost[0]}" if lost else None
