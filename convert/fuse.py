"""Fuse an adapter into its base: a checkpoint that needs no adapter library.

A quantized base is written out first and the adapter added in float32: the update of a fine-tuning is smaller
than the rounding of four bits, and adding it to rounded weights that are rounded again loses it. Quantizing
the fused model anew is possible, and then the report says what that changed.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_adapters import adapter
from mlx_adapters import model as models
from mlx_adapters.convert import files
from mlx_adapters.convert.checkpoint import convert, copy_tokenizer
from mlx_adapters.convert.to_transformers import write_transformers
from mlx_adapters.errors import ConfigError, unknown

__all__ = ["TARGETS", "Fused", "fuse"]

TARGETS = ("transformers", "mlx")
_PROMPTS = ("Tom has 3 apples and buys 4 more.", "The capital of France is", "Below is an instruction")


@dataclass(frozen=True, kw_only=True)
class Fused:
    """What was written. On a few prompts, in logits: `effect` is the largest change by the adapter,
    `error` the largest difference of the fused model from base and adapter apart, `error_rms` its mean."""

    path: Path
    bytes: int
    dtype: str
    layers: int
    effect: float
    error: float
    error_rms: float


def fuse(
    source: str | Path,
    folder: Path,
    dst: Path,
    *,
    to: str = "transformers",
    dtype: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
) -> Fused:
    """Merge the adapter in `folder` into the model `source`, and write the result to `dst`.

    `to` transformers gives a full-precision Hugging Face checkpoint, `to` mlx an MLX folder, quantized with
    `bits`. `dtype` is the base's by default, float32 where it was quantized. Raises ConfigError for an
    adapter that is no change of weights, OutputError when `dst` is not empty.
    """
    if to not in TARGETS:
        raise ConfigError(unknown("target", to, TARGETS))
    if (bits is not None or mode != "affine") and to != "mlx":
        raise ConfigError("a Hugging Face checkpoint is not quantized: leave --bits out, or give --to mlx")
    config = models.read_config(models.locate(source))
    kept = dtype or ("float32" if config.get("quantization") else config.get("dtype") or "float32")
    loaded = models.load(source, dtype="float32")
    loaded.model.eval()
    prompts = [loaded.tokenizer.encode(text) for text in _PROMPTS]
    plain = _logits(loaded.model, prompts)
    meta = adapter.load(loaded, folder)
    loaded.model.eval()
    apart = _logits(loaded.model, prompts)
    merged = [
        (path, _merged(layer, path, meta.method)) for path, layer in adapter.layers(loaded.model).items()
    ]
    loaded.model.update_modules(tree_unflatten(merged))
    with tempfile.TemporaryDirectory(prefix="mlx-adapters-fuse-") as scratch:
        if to == "transformers":
            with files.writing(dst) as place:
                write_transformers(loaded.model, loaded.config, place, dtype=kept)
                copy_tokenizer(loaded.path, place)
        else:
            dense = write_transformers(loaded.model, loaded.config, Path(scratch) / "dense", dtype=kept)
            copy_tokenizer(loaded.path, dense)
            convert(dense, dst, bits=bits, group_size=group_size, mode=mode)
        del loaded
    again = models.load(dst, dtype="float32")
    again.model.eval()
    fused = _logits(again.model, prompts)
    difference = np.concatenate([(a - b).ravel() for a, b in zip(fused, apart, strict=True)])
    return Fused(
        path=dst,
        bytes=sum(file.stat().st_size for file in dst.iterdir()),
        dtype=kept,
        layers=len(merged),
        effect=max(float(np.abs(a - b).max()) for a, b in zip(apart, plain, strict=True)),
        error=float(np.abs(difference).max()),
        error_rms=float(np.sqrt(np.square(difference).mean())),
    )


def _merged(layer: Any, path: str, method: str) -> Any:
    try:
        return layer.merge()
    except ConfigError:
        raise ConfigError(
            f"{method} cannot be fused: at {path} it is not a change of the layer's weight. Hand on the "
            "adapter itself: mlx-adapters export"
        ) from None


def _logits(model: Any, prompts: list[list[int]]) -> list[np.ndarray]:
    return [np.array(model(mx.array([ids]))[0].astype(mx.float32)) for ids in prompts]
