"""`mlx-adapters doctor`."""

import typer

from mlx_adapters.cli.report import report, reporting
from mlx_adapters.errors import counted
from mlx_adapters.screen import table


@reporting("name", "value", "ok", "remedy", each=True)
def command() -> None:
    """Check this machine: device, BLAS, memory, versions. Exit code 1 if something needs attention."""
    from mlx_adapters.doctor import doctor

    findings = doctor()
    wrong = sum(not finding.ok for finding in findings)

    def words() -> None:
        rows = [["ok" if f.ok else "problem", f.name, f.value, f.remedy or ""] for f in findings]
        table(["", "what", "found", "what to do"], rows)
        need = "needs" if wrong == 1 else "need"
        typer.echo(f"{counted(wrong, 'problem')} {need} attention" if wrong else "Ready to train.")

    report(findings, words, passed=not wrong)
