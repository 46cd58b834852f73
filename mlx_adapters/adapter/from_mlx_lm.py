"""mlx-lm's adapter folders, read as if PEFT had written them.

    adapter_config.json    fine_tune_type, lora_parameters (rank, scale, dropout, keys)
    adapters.safetensors   PATH.lora_a [in, rank], PATH.lora_b [rank, out], for DoRA PATH.m [out]

Its matrices are PEFT's transposed, its scale is alpha / rank, and its paths are those of the modules here.
What it trains of single experts PEFT does not have: that is read by `mlx-adapters import`.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_adapters.errors import AdapterError
from mlx_adapters.models.sites import to_hf

__all__ = ["MLX_LM", "as_peft_fields", "as_peft_tensors", "is_mlx_lm", "refuse_mlx_lm", "settings"]

MLX_LM = "adapters.safetensors"
_KINDS = ("lora", "dora")
_NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_IMPORT = "Write it as one of ours first: mlx-adapters import SRC DST --model MODEL"


def is_mlx_lm(folder: Path) -> bool:
    """Whether mlx-lm wrote the adapter in `folder`."""
    others = ("adapter_model.safetensors", "adapter_model.bin")
    return (folder / MLX_LM).exists() and not any((folder / name).exists() for name in others)


def refuse_mlx_lm(folder: Path) -> None:
    """AdapterError for mlx-lm's folder, where no model says what PyTorch calls its layers."""
    if is_mlx_lm(folder):
        raise AdapterError(f"{folder}: is mlx-lm's, whose layers have other names in PyTorch. {_IMPORT}")


def settings(fields: dict[str, Any], file: Path) -> tuple[str, int, float, float]:
    """(lora or dora, rank, scale, dropout) of mlx-lm's `adapter_config.json`; AdapterError for no adapter."""
    kind, given = fields.get("fine_tune_type", "lora"), fields.get("lora_parameters") or {}
    if kind not in _KINDS:
        raise AdapterError(f"{file}: fine_tune_type {kind!r} is not an adapter: only {', '.join(_KINDS)}")
    if absent := [name for name in ("rank", "scale") if not isinstance(given.get(name), (int, float))]:
        raise AdapterError(f"{file}: lora_parameters has no number for {' and '.join(absent)}")
    return kind, int(given["rank"]), float(given["scale"]), float(given.get("dropout") or 0.0)


def as_peft_fields(fields: dict[str, Any], file: Path, paths: set[str]) -> dict[str, Any]:
    """What PEFT's configuration would say; `paths` are the adapted modules."""
    kind, rank, scale, dropout = settings(fields, file)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": dropout,
        "use_dora": kind == "dora",
        "target_modules": sorted({path.rpartition(".")[2] for path in paths}),
        "base_model_name_or_path": fields.get("model"),
    }


def as_peft_tensors(arrays: dict[str, mx.array], model_type: str, file: Path) -> dict[str, mx.array]:
    """The tensors under PEFT's names and in its layout."""
    made = {}
    for name, array in arrays.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in _NAMES:
            raise AdapterError(f"{file}: {name} is not a tensor of an adapter")
        if array.ndim > 2:
            raise AdapterError(f"{file}: {name} adapts the matrices of single experts. {_IMPORT}")
        made[f"base_model.model.{to_hf(path, model_type)}.{_NAMES[leaf]}"] = (
            mx.contiguous(array.T) if array.ndim == 2 else array
        )
    return made
