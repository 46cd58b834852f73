"""`mlx-adapters compare A.json B.json`."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    a: Annotated[Path, typer.Argument(help="report of `mlx-adapters eval --output`")],
    b: Annotated[Path, typer.Argument(help="another, of the same items")],
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Tell which of two evaluations is better, by an exact paired test on the same items."""
    import json
    from dataclasses import asdict

    from mlx_adapters.evaluate.compare import compare, words
    from mlx_adapters.evaluate.records import read_report

    found = compare(read_report(a)[1], read_report(b)[1])
    if json_:
        typer.echo(json.dumps([asdict(one) for one in found], indent=1))
        return
    names = (a.stem, b.stem) if a.stem != b.stem else (str(a), str(b))
    tests = max(1, len(found) - 1)  # the pooled one is not counted
    for one in found:
        typer.echo(words(one, *names, tests=1 if one.task == "all" else tests))
    if tests > 1:
        typer.echo(f"With {tests} sets compared, p counts as small below {0.05 / tests:.2g} in each.")
