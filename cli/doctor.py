"""`mlx-adapters doctor`."""

import json as json_format
from dataclasses import asdict
from typing import Annotated

import typer

from mlx_adapters.cli.screen import table

__all__ = ["command"]


def command(json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Check this machine: device, BLAS and its speed, memory, versions. Exit code 1 if something is amiss."""
    from mlx_adapters.doctor import doctor

    findings = doctor()
    amiss = [finding for finding in findings if not finding.ok]
    if json:
        typer.echo(json_format.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        rows = [["ok" if f.ok else "AMISS", f.name, f.value, f.remedy or ""] for f in findings]
        table(["", "what", "found", "what to do"], rows)
        typer.echo(f"{len(amiss)} findings need attention" if amiss else "Ready to train.")
    if amiss:
        raise typer.Exit(1)
