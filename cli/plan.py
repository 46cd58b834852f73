"""`mlx-adapters plan MODEL`."""

import re
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_adapters.cli import complete
from mlx_adapters.cli.options import settings
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import say, table, track
from mlx_adapters.errors import ConfigError
from mlx_adapters.units import size

if TYPE_CHECKING:
    from mlx_adapters.train.plan import MemoryPlan, Plan

__all__ = ["command"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@reporting("memory", "process", "plans", "command")
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
    """Predict the memory of training: which settings fit, and the command for the fastest of them."""
    from mlx_adapters import methods
    from mlx_adapters.train import plan

    limit = None if memory is None else _bytes(memory)
    configs = plan.candidates(_numbers(batch_sizes), cutoff=tokens, loss_on=loss_on)
    say(f"running a step of four and of six blocks of {model}")
    chosen = methods.make(method, dict(settings(set_ or [])))
    found = plan.predict_all(model, method=chosen, configs=configs)
    plans = list(track("plan", found, len(configs), lambda one: f"batch size {one.batch_size}"))
    weighed = plan.weigh(plans, limit)
    arguments = _arguments(method, set_ or [], loss_on)
    best = weighed.best
    advice = f"mlx-adapters train {shlex.quote(model)} {_of(best)}{arguments}" if best else None

    def words() -> None:
        _table(weighed)
        typer.echo(
            f"{method}, rows of {tokens} tokens: {size(plans[0].weights)} of weights, "
            f"{size(plans[0].adapter)} for the adapter with gradient and optimizer, the rest activations"
        )
        typer.echo(
            f"The fastest that fits:\n    {advice}"
            if advice
            else f"None fits {size(weighed.memory)}: try fewer --tokens, or a base of fewer bits "
            "(convert --bits 4)"
        )

    rows = [asdict(one) | {"fits": weighed.fits(one)} for one in plans]
    document = {"memory": weighed.memory, "process": weighed.process, "plans": rows, "command": advice}
    report(document, words)


def _table(weighed: "MemoryPlan") -> None:
    columns = ["batch size", "gradient checkpointing", "arrays at the peak", "with the process"]
    table(
        [*columns, f"fits {size(weighed.memory)}"],
        [
            [
                str(one.batch_size),
                "yes" if one.gradient_checkpointing else "no",
                size(one.peak),
                size(one.peak + weighed.process),
                "yes" if weighed.fits(one) else "NO",
            ]
            for one in weighed.plans
        ],
    )


def _of(best: "Plan") -> str:
    """The options of a plan."""
    words = f"--data my.jsonl --output my-adapter --batch-size {best.batch_size} --cutoff {best.tokens}"
    return words + (" --gradient-checkpointing" if best.gradient_checkpointing else "")


def _arguments(method: str, fields: list[str], loss_on: str) -> str:
    """The other options, where they are not the default."""
    words = [] if method == "lora" else ["--method", method]
    for field in fields:
        words += ["--set", field]
    if loss_on != "completion":
        words += ["--loss-on", loss_on]
    return "".join(f" {shlex.quote(word)}" for word in words)


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
