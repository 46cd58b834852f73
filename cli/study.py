"""`mlx-adapters study STUDY.yaml`."""

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_adapters.cli.options import arg, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import say, table
from mlx_adapters.cpu.processes import run_each
from mlx_adapters.errors import ConfigError, counted, unknown
from mlx_adapters.units import duration, size

if TYPE_CHECKING:
    from mlx_adapters.study.grid import Cell, Study

_AGAIN = "Run the study again to go on"


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
        found = {"report": None, "cells": [result], "failed": failed, "seconds": _seconds([result])}
        report(found, lambda: None)
    else:
        with run.alone(folder):
            again = {"--model": model, "--max-steps": max_steps, "--limit": limit, "--output": folder}
            pairs = [(name, str(value)) for name, value in again.items() if value is not None]
            _run(study, folder, jobs, ["study", str(file), *chain(*pairs)])
            _finish(study, folder)


def _print_cells(study: "Study") -> None:
    from mlx_adapters.study.run import budgets, planned

    found = planned(study)

    def words() -> None:
        table(*budgets(found))
        settings = study.settings
        items = f"at most {counted(settings.limit, 'item')} each" if settings.limit else "all items"
        typer.echo(
            f"{counted(len(found), 'cell')} on {study.model}: trained on {settings.data}, "
            f"tested on {settings.tasks}, {items}"
        )

    report({"report": None, "cells": found, "failed": [], "seconds": 0.0}, words)


def _run(study: "Study", folder: Path, jobs: int, own: list[str]) -> None:
    """The cells that are left: here, or each in a process of its own by the command `own` and --cell."""
    from mlx_adapters.study.cells import BASE, cell_folder
    from mlx_adapters.study.run import ended, fitting, left

    cells, count = left(study, folder), len(study.cells) + study.settings.base
    say(f"{study.settings.name}: {counted(count, 'cell')}, {count - len(cells)} done before")
    if jobs > 1 and cells:
        fit, each = fitting(study)
        say(f"the largest cell takes {size(each)}: the free memory is enough for {fit} at once")
        jobs = min(jobs, fit)
    names = [cell.id if cell else BASE for cell in cells]
    if jobs == 1:
        for number, (name, cell) in enumerate(zip(names, cells), start=1):
            say(f"\n[{number}/{len(cells)}] {name}")
            _attempt(study, cell, folder)
        return
    all_jobs = [(name, [*own, "--cell", name], cell_folder(folder, name) / "log.txt") for name in names]
    stopping = "stopping: the cells save what they have"
    for name, code in run_each("mlx_adapters.cli.app", all_jobs, at_once=jobs, warn=say, stopping=stopping):
        if code is None:
            say(f"{name}: started")
        else:
            result = ended(folder, name, code)
            say(f"{name}: {result['status']}" + (f" ({result['error']})" if "error" in result else ""))


def _attempt(study: "Study", cell: "Cell | None", folder: Path) -> dict[str, Any]:
    """Run what is left of a cell with progress on screen, and return its result."""
    from mlx_adapters.cli import eval, train
    from mlx_adapters.study.cells import CellRun, Training

    stopped: typer.Exit | None = None
    with CellRun(study, cell, folder, warn=say) as run:
        for phase in run.phases():
            if not isinstance(phase, Training):
                eval.follow(phase, go_on=_AGAIN)
                continue
            try:
                phase.seconds = train.run(phase.trainer, go_on=_AGAIN)
            except typer.Exit as error:  # Ctrl-C; a RuntimeError, which the cell would take for its own
                stopped = error
                break
    if stopped is not None:
        raise stopped
    result = run.result or {}
    if result["status"] == "failed":
        say(f"FAILED {run.name}: {result['error']}")
    else:
        say(", ".join(f"{score['task']} {score['accuracy']:.1%}" for score in result["scores"]))
    return result


def _finish(study: "Study", folder: Path) -> None:
    from mlx_adapters.study import report as page

    results = page.write(study, folder)
    failed = [row["id"] for row in results if row["status"] == "failed"]
    seconds, file = _seconds(results), folder / "report.html"

    def words() -> None:
        table(page.columns(results), page.cells_of(results))
        for line in page.none_right(results):
            typer.echo(line)
        done = counted(len(results) - len(failed), "cell")
        typer.echo(f"{file}: {done}, {duration(seconds)} of work")

    report({"report": file, "cells": results, "failed": failed, "seconds": seconds}, words)
    if failed:
        say(f"failed: {', '.join(failed)}. Run the study again to try them again")
        raise typer.Exit(1)


def _seconds(results: list[dict[str, Any]]) -> float:
    return sum(row.get("train_seconds", 0.0) + row.get("eval_seconds", 0.0) for row in results)
