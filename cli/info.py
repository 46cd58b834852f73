"""`mlx-adapters info FOLDER`: read from the small files and the weight files' headers."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_adapters.cli.options import arg
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.units import size

__all__ = ["command"]

_WIDE = 90  # longer mappings are printed one entry per line


_FILES = ("files", "tensors", "stored_values")
_OF_MODELS = ("architecture", "source", "layers", "hidden_size", "vocabulary", "quantization", "targets")
_OF_ADAPTERS = ("method", "fields", "base", "template", "loss_on", "training", "seen", "checkpoints")


@reporting("kind", "folder", *_OF_MODELS, *_OF_ADAPTERS, *_FILES)
def command(folder: Annotated[Path, arg("model folder or adapter folder")]) -> None:
    """Say what is in a folder of a model or an adapter.

    No weights are loaded.
    """
    from mlx_adapters.convert.info import info

    found = info(folder)
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
