"""`mlx-adapters compare A.json B.json`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_adapters.cli.report import report, reporting

__all__ = ["command"]


_KEYS = ("task", "total", "a_correct", "b_correct", "only_a", "only_b", "difference", "low", "high", "p")


@reporting(*_KEYS, each=True)
def command(
    a: Annotated[Path, typer.Argument(help="report of `mlx-adapters eval --output`")],
    b: Annotated[Path, typer.Argument(help="another, of the same items")],
) -> None:
    """Tell which of two evaluations is better, by a paired test."""
    from mlx_adapters.evaluate.compare import compare, words
    from mlx_adapters.evaluate.records import read_report

    found = compare(read_report(a)[1], read_report(b)[1])
    names = (a.stem, b.stem) if a.stem != b.stem else (str(a), str(b))
    tests = max(1, len(found) - 1)  # the pooled one is not counted

    def sentences() -> None:
        for one in found:
            typer.echo(words(one, *names, tests=1 if one.task == "all" else tests))
        if tests > 1:
            typer.echo(f"With {tests} sets compared, p counts as small below {0.05 / tests:.2g} in each.")

    report(found, sentences)
