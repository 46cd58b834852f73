"""`mlx-adapters plan MODEL`."""

from dataclasses import asdict
from typing import Annotated

import typer

from mlx_adapters.cli import options
from mlx_adapters.cli.complete import FIELDS
from mlx_adapters.cli.options import METHOD, numbers, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.errors import ConfigError
from mlx_adapters.fields import settings
from mlx_adapters.screen import say, table
from mlx_adapters.units import bytes_of, size

_LOSS_ON = "completion or all, as `train --loss-on`"


@reporting("memory", "process", "plans", "command", "runner_up")
def command(
    model: options.Model,
    method: Annotated[str, METHOD] = "lora",
    set_: options.Settings = None,
    tokens: Annotated[int, opt("longest row, as `train --max-length`", min=2)] = 256,
    batch_sizes: Annotated[str, opt("batch sizes to try")] = "1,2,4,8",
    loss_on: Annotated[str, opt(_LOSS_ON, values=FIELDS["loss_on"])] = "completion",
    memory: Annotated[str | None, opt("of the machine, 16GB say [default: this one]")] = None,
) -> None:
    """Predict memory and time of training: which settings fit, and the command for the fastest of them.

    Ctrl-C ends it with the settings that are known by then.
    """
    from mlx_adapters import methods
    from mlx_adapters.train import plan

    limit, fields = None if memory is None else _bytes(memory), set_ or []
    sizes = numbers(batch_sizes, int, "--batch-sizes", "whole numbers joined by commas, 1,2,4 say", least=1)
    configs = plan.candidates(sizes, max_length=tokens, loss_on=loss_on)
    say(f"running steps of a few blocks of {model}")
    found = plan.predict_all(
        model, method=methods.make(method, dict(settings(fields))), configs=configs, check=True
    )
    plans: list[plan.Plan] = []
    try:
        for one in found:
            plans.append(one)
            say(plan.in_words(one))
    except KeyboardInterrupt:
        if not plans:
            raise
        say(f"stopped: {len(plans)} of {len(configs)} settings are known")
    weighed = plan.weigh(plans, limit)
    chosen = [
        plan.command(model, one, method=method, fields=fields, loss_on=loss_on) if one else None
        for one in (weighed.best, weighed.runner_up)
    ]

    def words() -> None:
        table(*plan.cells(weighed))
        typer.echo(
            f"{method}, rows of {tokens} tokens: {size(plans[0].weights)} of weights, "
            f"{size(plans[0].adapter)} for the adapter with gradient and optimizer, the rest activations"
        )
        typer.echo(plan.accuracy(plans))
        if chosen[1]:
            typer.echo(f"The next that fits:\n    {chosen[1]}")
        none = f"None fits {size(weighed.memory)}: try fewer --tokens, or a base of fewer bits "
        typer.echo(f"The fastest that fits:\n    {chosen[0]}" if chosen[0] else none + "(convert --bits 4)")

    rows = [asdict(one) | {"fits": weighed.fits(one)} for one in plans]
    sizes_of = {"memory": weighed.memory, "process": weighed.process, "plans": rows}
    report(sizes_of | {"command": chosen[0], "runner_up": chosen[1]}, words)


def _bytes(memory: str) -> int:
    try:
        return bytes_of(memory)
    except ValueError:
        raise ConfigError(f"--memory {memory!r}: write it like 16GB") from None
