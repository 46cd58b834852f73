"""`mlx-adapters models [NAME ...]`."""

import shutil
import sys
from typing import Annotated, Any

import typer

from mlx_adapters.cli.options import arg, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import table


@reporting("architecture", "in_table", "methods", "targets", "compared", each=True)
def command(
    names: Annotated[list[str] | None, arg("architectures (model_type in config.json)")] = None,
    everything: Annotated[bool, opt("every model file of mlx-lm and ours", "--all")] = False,
) -> None:
    """Show which methods work on which architectures.

    Each was tried, on a tiny random model. The last table says what was compared with PyTorch on one.
    """
    from mlx_adapters import methods
    from mlx_adapters.models.architectures.table import with_layers
    from mlx_adapters.models.supported import architectures, compared, supported, targets

    chosen = names or (architectures() if everything else with_layers())
    results = [supported(name, methods.names()) for name in chosen]

    def words() -> None:
        _support(results)
        for title, heads, rows in (targets(results), compared(results)):
            if rows:
                typer.echo(f"\n{title}:")
                table(heads, rows)

    report(results, words)


def _support(results: list[dict[str, Any]]) -> None:
    from mlx_adapters.models.supported import cells, side_by_side

    columns, reasons = cells(results)
    screen = shutil.get_terminal_size().columns if sys.stdout.isatty() else 160
    names = [result["architecture"] for result in results]
    for methods in side_by_side(columns, screen - 4 - max(map(len, ("architecture", *names)))):
        # one word under the other: more columns fit a screen
        heads = ["architecture", *(method.replace("_", "\n") for method in methods)]
        table(heads, [list(row) for row in zip(names, *(columns[m] for m in methods), strict=True)])
    for number, reason in enumerate(reasons, start=1):
        typer.echo(f"{number:>3}  {reason}")
