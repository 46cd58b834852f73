"""`mlx-adapters info FOLDER`: read from the small files and the weight files' headers."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_adapters.cli.options import arg
from mlx_adapters.cli.report import report, reporting

_FILES = ("files", "tensors", "stored_values")
_OF_MODELS = ("architecture", "source", "layers", "hidden_size", "vocabulary", "quantization", "targets")
_OF_ADAPTERS = ("method", "fields", "base", "template", "loss_on", "training", "seen", "checkpoints")


@reporting("kind", "folder", *_OF_MODELS, *_OF_ADAPTERS, *_FILES)
def command(folder: Annotated[Path, arg("model folder, adapter folder or an adapter's hub id")]) -> None:
    """Say what is in a folder of a model or an adapter.

    No weights are loaded.
    """
    from mlx_adapters.convert.info import info, lines

    found = info(folder)
    report(found, lambda: typer.echo("\n".join(lines(found))))
