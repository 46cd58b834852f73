"""`mlx-adapters methods [NAME]`."""

from typing import Annotated, Any

import typer

from mlx_adapters.cli import complete
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import table

__all__ = ["command"]


_KEYS = ("method", "what", "authors", "paper", "stands_on", "mergeable", "in_peft", "fields", "doc")


@reporting(*_KEYS, each=True)
def command(
    name: Annotated[
        str | None, typer.Argument(help="show the fields of this method", autocompletion=complete.methods)
    ] = None,
) -> None:
    """List the adapter methods, or the fields of one for --set."""
    from mlx_adapters import methods

    found = [_about(method) for method in ([name] if name else methods.names())]
    report(found, lambda: _show(found[0]) if name else _list(found))


def _about(name: str) -> dict[str, Any]:
    import dataclasses

    from mlx_adapters import methods

    method = methods.find(name)
    return {
        "method": name,
        "what": method.TITLE,
        "authors": method.AUTHORS,
        "paper": method.PAPER,
        "stands_on": method.STANDS_ON,
        "mergeable": method.mergeable(),
        "in_peft": method.IN_PEFT,
        "fields": [
            {"name": f.name, "default": f.default, "help": f.metadata["help"]}
            for f in dataclasses.fields(method)
        ],
        "doc": method.explanation(),
    }


def _list(found: list[dict[str, Any]]) -> None:
    table(
        ["method", "what it is", "stands on", "mergeable", "in PEFT", "paper"],
        [
            [
                about["method"],
                about["what"],
                about["stands_on"],
                _yes(about["mergeable"]),
                _yes(about["in_peft"]),
                f"{about['authors']}\n{about['paper']}",
            ]
            for about in found
        ],
    )
    typer.echo("Fields of one: mlx-adapters methods NAME. Where each works: mlx-adapters models")


def _show(about: dict[str, Any]) -> None:
    typer.echo(about["doc"] + "\n")
    for key in ("stands_on", "mergeable", "in_peft"):
        value = about[key]
        typer.echo(f"{key.replace('_', ' '):<12}{_yes(value) if isinstance(value, bool) else value}")
    table(
        ["--set", "default", "meaning"],
        [[field["name"], str(field["default"]), field["help"]] for field in about["fields"]],
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"
