"""`mlx-adapters models [NAME ...]`."""

import shutil
import sys
from typing import Annotated, Any

import typer

from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import table

__all__ = ["command"]


@reporting("architecture", "in_table", "methods", "targets", each=True)
def command(
    names: Annotated[
        list[str] | None, typer.Argument(help="architectures (model_type in config.json)")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="every model file of mlx-lm and ours")] = False,
) -> None:
    """Show which methods work on which architectures.

    Each was tried, on a tiny random model.
    """
    from mlx_adapters import methods
    from mlx_adapters.models.architectures.table import with_layers
    from mlx_adapters.models.supported import architectures, supported

    chosen = names or (architectures() if everything else with_layers())
    results = [supported(name, methods.names()) for name in chosen]

    def words() -> None:
        _support(results)
        _targets(results)

    report(results, words)


def _support(results: list[dict[str, Any]]) -> None:
    reasons: dict[str, int] = {}
    columns: dict[str, list[str]] = {method: [] for method in results[0]["methods"]}
    for result in results:
        name = result["architecture"]
        for method, reason in result["methods"].items():
            plain = reason and _plain(reason, method, name)
            columns[method].append("yes" if plain is None else f"no {_number(plain, reasons)}")
    names = [result["architecture"] for result in results]
    for methods in _fitting(columns, max(map(len, ("architecture", *names)))):
        # one word under the other: more columns fit a screen
        heads = ["architecture", *(method.replace("_", "\n") for method in methods)]
        table(heads, [list(row) for row in zip(names, *(columns[m] for m in methods), strict=True)])
    for reason, number in reasons.items():
        typer.echo(f"{number:>3}  {reason}")


def _fitting(columns: dict[str, list[str]], first: int) -> list[list[str]]:
    """The methods in groups whose columns stand side by side on the screen."""
    screen = shutil.get_terminal_size().columns if sys.stdout.isatty() else 160
    groups: list[list[str]] = [[]]
    used = first + 4
    for method, cells in columns.items():
        width = max(len(text) for text in (*method.split("_"), *cells)) + 3
        if groups[-1] and used + width > screen:
            groups.append([])
            used = first + 4
        groups[-1].append(method)
        used += width
    return groups


def _number(reason: str, reasons: dict[str, int]) -> int:
    return reasons.setdefault(reason, len(reasons) + 1)


def _plain(reason: str, method: str, name: str) -> str:
    """A reason without the names that its row and column have, so that equal ones share a number."""
    return (
        reason.removeprefix(f"{method}: ")
        .removeprefix(f"{name}: ")
        .replace(f"a {name} model", "the model")
        .replace(f"this {name} model", "the model")
    )


def _targets(results: list[dict[str, Any]]) -> None:
    kinds = next((list(result["targets"]) for result in results if result["targets"]), [])
    rows = [
        [result["architecture"], *(" ".join(result["targets"][kind]) or "-" for kind in kinds)]
        for result in results
        if result["targets"]
    ]
    if rows:
        typer.echo("\nDefault targets (--set targets=... chooses others):")
        table(["architecture", *kinds], rows)
