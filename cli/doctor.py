"""`mlx-adapters doctor`."""

import typer

from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import table

__all__ = ["command"]


@reporting("name", "value", "ok", "remedy", each=True)
def command() -> None:
    """Check this machine: device, BLAS, memory, versions. Exit code 1 if something is amiss."""
    from mlx_adapters.doctor import doctor

    findings = doctor()
    amiss = [finding for finding in findings if not finding.ok]

    def words() -> None:
        rows = [["ok" if f.ok else "AMISS", f.name, f.value, f.remedy or ""] for f in findings]
        table(["", "what", "found", "what to do"], rows)
        typer.echo(f"{len(amiss)} findings need attention" if amiss else "Ready to train.")

    report(findings, words)
    if amiss:
        raise typer.Exit(1)
