"""`mlx-adapters study STUDY.yaml`."""

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_adapters.cli.options import arg, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.errors import ConfigError, counted, unknown
from mlx_adapters.screen import say, table
from mlx_adapters.units import duration, size

if TYPE_CHECKING:
    from mlx_adapters.evaluate.run import Part
    from mlx_adapters.study.cells import Training
    from mlx_adapters.study.grid import Cell, Study


@reporting("report", "cells", "failed", "seconds")
def command(
    file: Annotated[Path, arg("the study's YAML file, see examples/study-cpu.yaml")],
    output: Annotated[Path | None, opt("folder [default: the file's name]")] = None,
    model: Annotated[str | None, opt("another model than the file's")] = None,
    max_steps: Annotated[int | None, opt("at most N training steps per cell", min=1)] = None,
    limit: Annotated[int | None, opt("N items of each test set", min=1)] = None,
    jobs: Annotated[int, opt("cells at once, as far as memory allows", min=1)] = 1,
    dry_run: Annotated[bool, opt("print the cells and stop", "--dry-run")] = False,
    cell: Annotated[str | None, opt("only this cell, and no report")] = None,
) -> None:
    """Train and measure a grid of adapters, with a report.

    Run it again to continue.
    """
    from mlx_adapters.study import cells, grid, run

    study = grid.read(file, model=model, max_steps=max_steps, limit=limit)
    folder = output or Path(file.stem)
    if dry_run:
        _print_cells(study)
    elif cell is not None:
        known: dict[str, Cell | None] = {one.id: one for one in study.cells} | {cells.BASE: None}
        if cell not in known:
            raise ConfigError("--cell: " + unknown("cell", cell, known))
        with run.alone(cells.cell_folder(folder, cell)):
            result = _attempt(study, known[cell], folder)
        failed = [cell] if result["status"] == "failed" else []
        found = {"report": None, "cells": [result], "failed": failed, "seconds": run.seconds([result])}
        report(found, lambda: None)
    else:
        with run.alone(folder):
            again = {"--model": model, "--max-steps": max_steps, "--limit": limit, "--output": folder}
            pairs = [(name, str(value)) for name, value in again.items() if value is not None]
            _run(study, folder, jobs, ["study", str(file), *chain(*pairs)])
            _finish(study, folder)


def _print_cells(study: "Study") -> None:
    from mlx_adapters.study.run import budgets, in_words, planned

    found = planned(study)

    def words() -> None:
        table(*budgets(found))
        typer.echo(in_words(study))

    report({"report": None, "cells": found, "failed": [], "seconds": 0.0}, words)


def _run(study: "Study", folder: Path, jobs: int, own: list[str]) -> None:
    """The cells that are left: here, or each in a process of its own by the command `own` and --cell."""
    from mlx_adapters.study.cells import BASE
    from mlx_adapters.study.run import fitting, left, side_by_side

    cells, count = left(study, folder), len(study.cells) + study.settings.base
    say(f"{study.settings.name}: {counted(count, 'cell')}, {count - len(cells)} done before")
    if jobs > 1 and cells:
        fit, each = fitting(study)
        say(f"the largest cell takes {size(each)}: the free memory is enough for {fit} at once")
        jobs = min(jobs, fit)
    names = [cell.id if cell else BASE for cell in cells]
    if jobs > 1:
        side_by_side(folder, names, ["mlx_adapters.cli.app", *own], at_once=jobs, warn=say)
        return
    for number, (name, cell) in enumerate(zip(names, cells), start=1):
        say(f"\n[{number}/{len(cells)}] {name}")
        _attempt(study, cell, folder)


def work(phase: "Training | Part", *, go_on: str) -> None:
    """Train, or answer a test set, with progress on screen; `go_on` is the advice after Ctrl-C."""
    from mlx_adapters.cli import eval, train
    from mlx_adapters.study.cells import Training

    if isinstance(phase, Training):
        phase.seconds = train.follow(phase.trainer, go_on=go_on)
    else:
        eval.follow(phase, go_on=go_on)


def _attempt(study: "Study", cell: "Cell | None", folder: Path) -> dict[str, Any]:
    """Run what is left of a cell with progress on screen, and return its result."""
    from mlx_adapters.study.cells import CellRun

    with CellRun(study, cell, folder, warn=say) as run:
        for phase in run.phases():
            work(phase, go_on="Run the study again to go on")
    result = run.result or {}
    if result["status"] == "failed":
        say(f"FAILED {run.name}: {result['error']}")
    else:
        say(", ".join(f"{score['task']} {score['accuracy']:.1%}" for score in result["scores"]))
    return result


def _finish(study: "Study", folder: Path) -> None:
    from mlx_adapters.study import report as page
    from mlx_adapters.study.run import seconds

    results = page.write(study, folder)
    failed = [row["id"] for row in results if row["status"] == "failed"]
    took, file = seconds(results), folder / "report.html"

    def words() -> None:
        table(page.columns(results), page.cells_of(results))
        for line in page.none_right(results):
            typer.echo(line)
        typer.echo(f"{file}: {counted(len(results) - len(failed), 'cell')}, {duration(took)} of work")

    report({"report": file, "cells": results, "failed": failed, "seconds": took}, words)
    if failed:
        say(f"failed: {', '.join(failed)}. Run the study again to try them again")
        raise typer.Exit(1)
