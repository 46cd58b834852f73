"""A model from its configuration and its weights, by one rule for loading and for converting.

mlx-lm's own `load_model` reads every model*.safetensors in the folder; which files are the model is
`mlx_adapters.files.weights`' to say, so the tensors are given here.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_adapters.errors import AdaptersError, CheckpointError, UnsupportedError
from mlx_adapters.models import config as model_config

__all__ = ["build"]


def build(config: dict[str, Any], weights: dict[str, mx.array], name: str) -> nn.Module:
    """The model of a normalised `config` with `weights` in it, still on disk where they were not read yet.

    `name` is the model's in errors: CheckpointError lists the tensors that are missing, unknown or of another
    shape.
    """
    model_class, args_class = model_config.classes(config)
    if config.get("quantize_activations"):
        raise UnsupportedError(f"{name}: config.json: field 'quantize_activations' is set, which is not read")
    try:
        model: nn.Module = model_class(args_class.from_dict(config))
        weights = model.sanitize(weights) if hasattr(model, "sanitize") else weights
        if quantization := config.get("quantization"):
            _quantize(model, quantization, weights)
    except AdaptersError:
        raise
    except Exception as error:  # a shape or a name mlx-lm stumbles over
        raise CheckpointError(f"{name}: the weights do not fit config.json ({_first_line(error)})") from None
    _compare_names(name, dict(tree_flatten(model.parameters())), weights)
    model.eval()
    model.load_weights(list(weights.items()), strict=True)
    return model


def _quantize(model: nn.Module, quantization: dict[str, Any], weights: dict[str, mx.array]) -> None:
    from mlx_lm.utils import infer_quant_config

    def predicate(path: str, module: Any) -> Any:
        if f"{path}.scales" not in weights or not hasattr(module, "to_quantized"):
            return False
        if stated := quantization.get(path):
            return stated
        found = infer_quant_config(path, module, weights)
        return found | ({"global_scale": True} if f"{path}.global_scale" in weights else {})

    nn.quantize(
        model,
        group_size=quantization["group_size"],
        bits=quantization["bits"],
        mode=quantization.get("mode", "affine"),
        class_predicate=predicate,
    )


def _compare_names(name: str, wanted: dict[str, mx.array], given: dict[str, mx.array]) -> None:
    shapes = [
        f"{path} {tuple(given[path].shape)} instead of {tuple(array.shape)}"
        for path, array in wanted.items()
        if path in given and given[path].shape != array.shape
    ]
    found = {
        "missing": [path for path in wanted if path not in given],
        "unknown": [path for path in given if path not in wanted],
        "wrong shape": shapes,
    }
    said = [f"{len(paths)} {what}: {_some(paths)}" for what, paths in found.items() if paths]
    if said:
        raise CheckpointError(f"{name}: the weights do not fit config.json ({'; '.join(said)})")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] if lines else type(error).__name__
