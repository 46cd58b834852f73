"""`mlx-adapters models [NAME ...]`."""

import json
from typing import Annotated, Any

import typer

from mlx_adapters.cli.screen import table, track

__all__ = ["command"]


def command(
    names: Annotated[
        list[str] | None, typer.Argument(help="architectures (model_type in config.json)")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="every model file of mlx-lm and ours")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show which methods work on which architectures. Each is tried, on a tiny random model."""
    from mlx_adapters.models import samples, sites

    chosen = names or (sorted({*samples.architectures(), *sites.TABLE}) if everything else list(sites.TABLE))
    for name in chosen:
        samples.known(name)
    tried = track("models", map(_try, chosen), len(chosen), lambda result: str(result["architecture"]))
    results = list(tried)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    _support(results)
    _targets(results)


def _try(name: str) -> dict[str, Any]:
    from mlx_adapters import methods
    from mlx_adapters.errors import UnsupportedError
    from mlx_adapters.models import sites, support

    about = {"architecture": name, "in_table": name in sites.TABLE}
    try:
        works = support.support(name)
    except UnsupportedError as error:
        return {**about, "methods": dict.fromkeys(methods.names(), str(error)), "targets": None}
    return {**about, "methods": works, "targets": support.targets(name)}


def _support(results: list[dict[str, Any]]) -> None:
    reasons: dict[str, int] = {}
    rows = []
    for result in results:
        name = result["architecture"]
        cells = [
            "yes" if reason is None else f"no {_number(_plain(reason, method, name), reasons)}"
            for method, reason in result["methods"].items()
        ]
        rows.append([name, *cells])
    # one word under the other: all columns fit a screen
    table(["architecture", *(method.replace("_", "\n") for method in results[0]["methods"])], rows)
    for reason, number in reasons.items():
        typer.echo(f"{number:>3}  {reason}")


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
