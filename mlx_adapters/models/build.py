"""A model from its configuration and its weights, by one rule for loading and for converting.

mlx-lm's own `load_model` reads every model*.safetensors in the folder; which files are the model is
`mlx_adapters.files.weights`' to say, so the tensors are given here.
"""

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_adapters.errors import AdaptersError, CheckpointError, UnsupportedError, one_line
from mlx_adapters.models import config as model_config
from mlx_adapters.models import marks, names, torch_names
from mlx_adapters.models.recurrent.install import in_chunks
from mlx_adapters.models.unread import refuse_unread, unread

__all__ = ["build", "cast"]


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
        given, weights = weights, _sanitized(model, weights)
        if quantization := config.get("quantization"):
            _quantize(model, quantization, weights)
    except AdaptersError:
        raise
    except Exception as error:  # a shape or a name mlx-lm stumbles over
        raise CheckpointError(f"{name}: the weights do not fit config.json ({one_line(error)})") from None
    _compare_names(name, dict(tree_flatten(model.parameters())), weights)
    model.eval()
    model.load_weights(list(weights.items()), strict=True)
    fresh = functools.partial(_sanitized_anew, model_class, args_class, config)
    found = marks.seen(given, weights)
    packed = bool(config.get("quantization"))  # a folder in MLX's format holds what is used
    model.unread = () if packed else refuse_unread(name, config["model_type"], given, found, fresh)
    model.find_unread = None if packed else functools.partial(unread, found, fresh)
    # measured when it is asked for: to answer, a model does not need it
    model.tensor_names = functools.partial(_names, config, found, fresh)
    in_chunks(model)
    return model


def _names(
    config: dict[str, Any],
    found: marks.Sanitized,
    fresh: Callable[[dict[str, mx.array]], dict[str, mx.array]],
) -> names.Names | None:
    """Where the tensors of a model come from."""
    made = names.from_config(config) or marks.measure(found, fresh, packed=bool(config.get("quantization")))
    if made is None or made.same:
        # a folder in MLX's format: where its tensors came from is known of the family, or not at all
        known = torch_names.known_names(config["model_type"], found.made)
        if known is not None and not known.same:
            return known
    return made


def _sanitized(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The weights as the model file names them; `weights` stay as they are."""
    found: dict[str, mx.array] = model.sanitize(dict(weights)) if hasattr(model, "sanitize") else weights
    return found


def _sanitized_anew(
    model_class: Any, args_class: Any, config: dict[str, Any], weights: dict[str, mx.array]
) -> dict[str, mx.array]:
    return _sanitized(model_class(args_class.from_dict(config)), weights)


def cast(model: nn.Module, dtype: mx.Dtype, wanted: Callable[[str], bool] = lambda path: True) -> None:
    """Turn the floating-point parameters of `model` into `dtype`, those whose path is `wanted`."""
    parameters = [
        (path, array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) and wanted(path) else array)
        for path, array in tree_flatten(model.parameters())
    ]
    model.load_weights(parameters, strict=True)


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


def _compare_names(name: str, expected: dict[str, mx.array], found: dict[str, mx.array]) -> None:
    shapes = [
        f"{path} {tuple(found[path].shape)} instead of {tuple(array.shape)}"
        for path, array in expected.items()
        if path in found and found[path].shape != array.shape
    ]
    differences = {
        "missing": [path for path in expected if path not in found],
        "unknown": [path for path in found if path not in expected],
        "wrong shape": shapes,
    }
    listed = [f"{len(paths)} {what}: {_some(paths)}" for what, paths in differences.items() if paths]
    if listed:
        raise CheckpointError(f"{name}: the weights do not fit config.json ({'; '.join(listed)})")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
