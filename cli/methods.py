"""`mlx-adapters methods [NAME]`."""

from typing import Annotated, Any

import typer

from mlx_adapters.cli import complete
from mlx_adapters.cli.options import arg
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.screen import table

_KEYS = ("method", "what", "authors", "paper", "stands_on", "mergeable", "in_peft", "fields", "doc")

_FIRST = ("lora", "dora", "series", "parallel", "prefix", "prompt")


@reporting(*_KEYS, each=True)
def command(
    name: Annotated[str | None, arg("show the fields of this method", values=complete.methods)] = None,
) -> None:
    """List the adapter methods, or the fields of one for --set."""
    from mlx_adapters import methods

    found = [methods.about(method) for method in ([name] if name else methods.names())]
    report(found, lambda: _show(found[0]) if name else _list(found))


def _list(found: list[dict[str, Any]]) -> None:
    # what most people want, then by name
    found = sorted(found, key=lambda about: (_FIRST + (about["method"],)).index(about["method"]))
    rows = [
        [*(_cell(about[key]) for key in ("method", "what", "in_peft", "mergeable")), about["authors"]]
        for about in found
    ]
    table(["method", "what it is", "PEFT", "fuses", "paper"], rows, [about["paper"] for about in found])
    typer.echo("PEFT: PyTorch's PEFT reads it. fuses: it can be merged into the base's weights.")
    typer.echo("Fields of one: mlx-adapters methods NAME. Where each works: mlx-adapters models")


def _show(about: dict[str, Any]) -> None:
    typer.echo(about["doc"] + "\n")
    for key in ("stands_on", "mergeable", "in_peft"):
        typer.echo(f"{key.replace('_', ' '):<12}{_cell(about[key])}")
    rows = [[field["name"], str(field["default"]), field["help"]] for field in about["fields"]]
    table(["--set", "default", "meaning"], rows)


def _cell(value: str | bool) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
