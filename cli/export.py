"""`mlx-adapters export ADAPTER DST`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mlx_adapters.cli.complete import FORMATS
from mlx_adapters.cli.options import Adapter, Base, NewFolder, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.screen import say

_MODEL = "MLX model folder for --verify [default: the one it was trained on]"


@reporting("path", "format", "tensors", "bytes", "base", "opened", "verify")
def command(
    adapter: Adapter,
    dst: NewFolder,
    format: Annotated[str, opt("peft, adapterhub, llm-adapters or mlx-lm", values=FORMATS)] = "peft",
    base: Base = None,
    verify: Annotated[bool, opt("open it with peft and transformers and compare")] = False,
    model: Annotated[Path | None, opt(_MODEL)] = None,
) -> None:
    """Write the adapter for another library, by default PEFT.

    PyTorch opens the folder as it is.
    """
    from mlx_adapters import adapter as adapters
    from mlx_adapters.convert import exchange, peft
    from mlx_adapters.next_steps import after_export

    meta = adapters.read_meta(adapter)
    folder = exchange.base_to_verify(meta, format, model) if verify else None
    done = exchange.export(adapter, dst, format=format, base=base)
    verdict = None
    if folder:
        say("Opening it with peft and transformers ...")
        verdict = peft.verify(dst, folder)

    def words() -> None:
        text = "\n".join([*exchange.in_words(done, meta), *([str(verdict)] if verdict else [])])
        typer.echo("\n".join([text, *after_export(done, meta)]))

    checked = verdict and asdict(verdict) | {"passed": verdict.passed}
    report(asdict(done) | {"verify": checked}, words, passed=not verdict or verdict.passed)
