"""`mlx-adapters info FOLDER`: read from the small files and the weight files' headers."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import size
from mlx_adapters.errors import CheckpointError

__all__ = ["command"]

_WIDE = 90  # longer mappings are printed one entry a line


_FILES = ("files", "tensors", "stored_values")
_OF_MODELS = ("architecture", "source", "layers", "hidden_size", "vocabulary", "quantization", "targets")
_OF_ADAPTERS = ("method", "fields", "base", "template", "loss_on", "training", "seen", "checkpoints")


@reporting("kind", "folder", *_OF_MODELS, *_OF_ADAPTERS, *_FILES)
def command(folder: Annotated[Path, typer.Argument(help="model folder or adapter folder")]) -> None:
    """Say what is in a folder of a model or an adapter.

    No weights are loaded.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give a model folder or an adapter folder")
    found = _adapter(folder) if (folder / "adapter_config.json").exists() else _model(folder)
    report(found, lambda: _print(found))


def _print(found: dict[str, Any]) -> None:
    amounts: dict[str, Callable[[int], str]] = {"files": size, "stored_values": "{:,}".format}
    for key, value in found.items():
        if key in amounts and value:
            value = {name: amounts[key](count) for name, count in value.items()}
        elif key == "seen" and value is not None:
            value = f"{value} training questions"
        lines = _lines(value)
        typer.echo(f"{key.replace('_', ' '):<14} {lines[0]}")
        for line in lines[1:]:
            typer.echo(f"{'':<14} {line}")


def _model(folder: Path) -> dict[str, Any]:
    from mlx_adapters.files import weights
    from mlx_adapters.models import sites
    from mlx_adapters.models.load import read_config
    from mlx_adapters.models.origin import remembered

    config = read_config(folder)
    quantization = config.get("quantization") or {}
    row = sites.TABLE.get(config["model_type"])
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
        "targets": {"attn": list(row.attn), "mlp": list(row.mlp)} if row else None,
    }


def _adapter(folder: Path) -> dict[str, Any]:
    from mlx_adapters import adapter
    from mlx_adapters.data.overlap import questions

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
        **_weights([file for file in (folder / adapter.WEIGHTS,) if file.exists()]),
    }


def _weights(found: list[Path]) -> dict[str, Any]:
    from mlx_adapters.files import weights

    entries = [
        entry
        for file in found
        for name, entry in weights.header(file).items()
        if name != "__metadata__"
    ]  # fmt: skip
    types: Counter[str] = Counter()
    for entry in entries:
        types[entry["dtype"]] += math.prod(entry["shape"])
    return {
        "files": {file.name: file.stat().st_size for file in found} or None,
        "tensors": len(entries),
        "stored_values": dict(types.most_common()) or None,
    }


def _lines(value: Any) -> list[str]:
    text = _text(value)
    if isinstance(value, dict) and len(text) > _WIDE:
        return [f"{key}={_text(each)}" for key, each in value.items()]
    return [text]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}={_text(each)}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)
