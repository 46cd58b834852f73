"""`mlx-adapters plan MODEL`."""

import re
from typing import Annotated

import typer

from mlx_adapters.cli import complete
from mlx_adapters.cli.options import settings
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import say, size, table, track
from mlx_adapters.errors import ConfigError

__all__ = ["command"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@reporting("memory", "process", "plans")
def command(
    model: Annotated[str, typer.Argument(help="model folder or hub id")],
    method: Annotated[
        str, typer.Option(help="see `mlx-adapters methods`", autocompletion=complete.methods)
    ] = "lora",
    set_: Annotated[list[str] | None, typer.Option("--set", help="a field of the method: rank=16")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="longest row, as `train --cutoff`")] = 256,
    batch_sizes: Annotated[str, typer.Option(help="batch sizes to try")] = "1,2,4,8",
    loss_on: Annotated[
        str, typer.Option(help="completion or all, as `train --loss-on`", autocompletion=complete.loss_on)
    ] = "completion",
    memory: Annotated[str | None, typer.Option(help="of the machine, 16GB say [default: this one]")] = None,
) -> None:
    """Predict the memory of training, and which settings fit."""
    import dataclasses

    from mlx_adapters import backend
    from mlx_adapters.train import plan
    from mlx_adapters.train.config import TrainConfig

    limit = backend.total_memory() if memory is None else _bytes(memory)
    tried = [(again, batch) for again in (False, True) for batch in _numbers(batch_sizes)]
    say(f"running four and six blocks of {model} for each of {len(tried)} settings")
    plans = [
        plan.predict(
            model,
            method=method,
            fields=dict(settings(set_ or [])),
            config=TrainConfig(
                batch_size=batch, cutoff=tokens, gradient_checkpointing=again, loss_on=loss_on
            ),
        )
        for again, batch in track("plan", tried, len(tried), lambda setting: f"batch size {setting[1]}")
    ]
    process = plan.overhead(plans)
    rows = [dataclasses.asdict(p) | {"fits": p.peak + process <= limit} for p in plans]

    def words() -> None:
        table(
            [
                "batch size",
                "gradient checkpointing",
                "arrays at the peak",
                "with the process",
                f"fits {size(limit)}",
            ],
            [
                [
                    str(p.batch_size),
                    "yes" if p.gradient_checkpointing else "no",
                    size(p.peak),
                    size(p.peak + process),
                    "yes" if p.peak + process <= limit else "NO",
                ]
                for p in plans
            ],
        )
        typer.echo(
            f"{method}, rows of {tokens} tokens: {size(plans[0].weights)} of weights, "
            f"{size(plans[0].adapter)} for the adapter with gradient and optimizer, the rest activations"
        )

    report({"memory": limit, "process": process, "plans": rows}, words)


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--batch-sizes {text!r}: write whole numbers joined by commas, 1,2,4 say")
    return numbers


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if not found:
        raise ConfigError(f"--memory {text!r}: write it like 16GB")
    return int(float(found[1]) * _UNITS[found[2]])
