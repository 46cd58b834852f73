"""`mlx-adapters models [NAME ...]`."""

from typing import Annotated

import typer

from mlx_adapters.cli.options import arg, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.screen import table


@reporting("architecture", "in_table", "methods", "targets", "compared", each=True)
def command(
    names: Annotated[list[str] | None, arg("architectures (model_type in config.json)")] = None,
    everything: Annotated[bool, opt("every model file of mlx-lm and ours", "--all")] = False,
) -> None:
    """Show which methods work on which architectures, and what was compared with PyTorch.

    Each was tried, on a tiny random model. Those that are named are shown with their default targets.
    """
    from mlx_adapters import methods
    from mlx_adapters.models.architectures.table import with_layers
    from mlx_adapters.models.supported import architectures, overview, supported, targets

    chosen = names or (architectures() if everything else with_layers())
    results = [supported(name, methods.names()) for name in chosen]

    def words() -> None:
        heads, rows, reasons = overview(results)
        table(heads, rows)
        for number, reason in enumerate(reasons, start=1):
            typer.echo(f"({number}) {reason}")
        heads, rows = targets(results)
        if names and rows:
            typer.echo("\nDefault targets (--targets chooses others):")
            table(heads, rows)
        elif not everything:
            typer.echo("All others: --all. Default targets of one: mlx-adapters models NAME")

    report(results, words)
