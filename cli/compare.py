"""`mlx-adapters compare A.json B.json`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mlx_adapters.cli.options import arg
from mlx_adapters.cli.report import report, reporting

_KEYS = ("task", "part", "total", "seen", "a_correct", "b_correct", "only_a", "only_b", "difference", "low")


@reporting(*_KEYS, "high", "p", "differ", each=True)
def command(
    a: Annotated[Path, arg("report of `mlx-adapters eval --output`")],
    b: Annotated[Path, arg("another, of the same items")],
) -> None:
    """Tell which of two evaluations is better, by a paired test."""
    from mlx_adapters.evaluate.compare import compare, differ, sentences
    from mlx_adapters.evaluate.records import read_report

    (ours, our_records), (theirs, their_records) = read_report(a), read_report(b)
    found, others = compare(our_records, their_records), differ(ours, theirs)
    names = (a.stem, b.stem) if a.stem != b.stem else (str(a), str(b))
    lines = sentences(found, *names, others)
    report([asdict(one) | {"differ": others} for one in found], lambda: typer.echo("\n".join(lines)))
