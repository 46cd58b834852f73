"""What is in a folder of a model or an adapter, from its small files and the weight files' headers."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_adapters import adapter
from mlx_adapters.data.overlap import questions
from mlx_adapters.errors import CheckpointError
from mlx_adapters.files import weights
from mlx_adapters.models.architectures.table import architecture
from mlx_adapters.models.load import read_config
from mlx_adapters.models.origin import remembered
from mlx_adapters.units import size

__all__ = ["info", "lines"]

_WIDE = 90  # longer mappings get one line per entry


def info(folder: str | Path) -> dict[str, Any]:
    """The facts of a model folder or an adapter folder as JSON values; no weights are loaded.

    Raises CheckpointError or AdapterError for a folder that is neither.
    """
    place = adapter.located(folder)
    if not place.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give a model folder or an adapter folder")
    return _adapter(place) if (place / adapter.CONFIG).exists() else _model(place)


def _model(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    quantization = config.get("quantization") or {}
    row = architecture(config["model_type"])
    plain = {name: value for name, value in quantization.items() if not isinstance(value, dict | bool)}
    mixed = sum(isinstance(value, dict) for value in quantization.values())
    return {
        "kind": "model",
        "folder": str(folder),
        "architecture": config["model_type"],
        "source": remembered(config).get("source"),
        "layers": config.get("num_hidden_layers"),
        "hidden_size": config.get("hidden_size"),
        "vocabulary": config.get("vocab_size"),
        "quantization": (plain | ({"modules_of_their_own": mixed} if mixed else {})) or None,
        **_weights(weights.weight_files(folder)),
        "targets": {"attn": list(row.attn), "mlp": list(row.mlp)} if row.attn else None,
    }


def _adapter(folder: Path) -> dict[str, Any]:
    meta = adapter.read_meta(folder)
    return {
        "kind": "adapter",
        "folder": str(folder),
        "method": meta.method.NAME,
        "fields": asdict(meta.method),
        "base": meta.base or None,
        "template": meta.template or None,
        "loss_on": meta.loss_on or None,
        "training": meta.training or None,
        "seen": questions(meta.seen) if meta.seen else None,
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").glob("step-*")) or None,
        **_weights([file for file in (adapter.weights_file(folder),) if file.exists()]),
    }


def _weights(found: list[Path]) -> dict[str, Any]:
    headers = [weights.header(file) for file in found if file.suffix == ".safetensors"]
    entries = [entry for one in headers for name, entry in one.items() if name != "__metadata__"]
    types: Counter[str] = Counter()
    for entry in entries:
        types[entry["dtype"]] += math.prod(entry["shape"])
    return {
        "files": {file.name: file.stat().st_size for file in found} or None,
        "tensors": len(entries) if headers else None,
        "stored_values": dict(types.most_common()) or None,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The facts as text, one per line; a long mapping has a line for each of its entries."""
    amounts: dict[str, Callable[[int], str]] = {"files": size, "stored_values": "{:,}".format}
    text = []
    for key, value in found.items():
        if key in amounts and value:
            value = {name: amounts[key](count) for name, count in value.items()}
        elif key == "seen" and value is not None:
            value = f"{value} training questions"
        parts = [_text(value)]
        if isinstance(value, dict) and len(parts[0]) > _WIDE:
            parts = [f"{name}={_text(each)}" for name, each in value.items()]
        heads = [key.replace("_", " "), *[""] * (len(parts) - 1)]
        text += [f"{head:<14} {part}" for head, part in zip(heads, parts)]
    return text


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}={_text(each)}" for key, each in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
