"""`mlx-adapters study STUDY.yaml`."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_adapters import device
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import duration, say, size, table
from mlx_adapters.cpu import blas, children, cores
from mlx_adapters.errors import AdaptersError, ConfigError, counted, unknown, writing_to
from mlx_adapters.files.lock import locked

if TYPE_CHECKING:
    from mlx_adapters.study.grid import Cell, Study

__all__ = ["command"]


@reporting("report", "cells", "failed", "seconds")
def command(
    file: Annotated[Path, typer.Argument(help="the study's YAML file, see examples/study-cpu.yaml")],
    output: Annotated[Path | None, typer.Option(help="folder [default: the file's name]")] = None,
    model: Annotated[str | None, typer.Option(help="another model than the file's")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="at most N training steps a cell")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="N items of each test set")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="cells at once, as far as memory allows")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the cells and stop")] = False,
    cell: Annotated[str | None, typer.Option(help="only this cell, and no report")] = None,
) -> None:
    """Train and measure a grid of adapters, with a report.

    Run it again to go on.
    """
    from mlx_adapters.study import cells, grid

    study = grid.read(file, model=model, max_steps=max_steps, limit=limit)
    folder = output or Path(file.stem)
    if dry_run:
        _print_cells(study)
        return
    if cell is not None:
        known: dict[str, Cell | None] = {one.id: one for one in study.cells} | {cells.BASE: None}
        if cell not in known:
            raise ConfigError("--cell: " + unknown("cell", cell, known))
        with _alone(cells.cell_folder(folder, cell)):
            result = _attempt(study, known[cell], folder)
        failed = [cell] if result["status"] == "failed" else []
        report(
            {"report": None, "cells": [result], "failed": failed, "seconds": _seconds([result])}, lambda: None
        )
        return
    with _alone(folder):
        _run(study, folder, jobs)
        _finish(study, folder)


def _print_cells(study: "Study") -> None:
    from mlx_adapters.study.cells import parameters

    counts = parameters(study)
    planned: list[dict[str, Any]] = [
        {
            "id": one.id,
            "trainable": counts[one.id],
            "lr": one.train.lr,
            "steps": one.train.steps,
            "epochs": None if one.train.steps else one.train.epochs,
            "batch": one.train.batch_size * one.train.accumulation,
            "seed": one.train.seed,
        }
        for one in study.cells
    ]

    def words() -> None:
        rows = [
            [
                row["id"],
                f"{row['trainable']:,}",
                f"{row['lr']:g}",
                counted(row["steps"], "step") if row["steps"] else counted(row["epochs"], "epoch"),
                str(row["batch"]),
                str(row["seed"]),
            ]
            for row in planned
        ]
        table(["cell", "trainable", "lr", "budget", "batch", "seed"], rows)
        settings = study.settings
        items = f"at most {counted(settings.limit, 'item')} each" if settings.limit else "all items"
        typer.echo(
            f"{counted(len(rows), 'cell')} on {study.model}: trained on {settings.data}, "
            f"tested on {settings.tasks}, {items}"
        )

    report({"report": None, "cells": planned, "failed": [], "seconds": 0.0}, words)


def _run(study: "Study", folder: Path, jobs: int) -> None:
    from mlx_adapters.study import cells

    wanted: list[Cell | None] = [None] if study.settings.base else []
    wanted += study.cells
    left = []
    for one in wanted:
        name = one.id if one else cells.BASE
        before = cells.finished(folder, name)
        if before is None or before["status"] != "done":
            left.append(one)
        else:
            cells.same_rules(study, before, cells.cell_folder(folder, name) / "cell.json")
    say(f"{study.settings.name}: {counted(len(wanted), 'cell')}, {len(wanted) - len(left)} done before")
    if jobs > 1 and left:
        jobs = min(jobs, _fitting(study))
    if jobs > 1:
        _at_once(left, folder, jobs)
        return
    for number, one in enumerate(left, start=1):
        say(f"\n[{number}/{len(left)}] {one.id if one else cells.BASE}")
        _attempt(study, one, folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        yield


def _attempt(study: "Study", cell: "Cell | None", folder: Path) -> dict[str, Any]:
    """Run a cell and return its record; what goes wrong in it is written down and stops no other."""
    from mlx_adapters.cli.eval import run_task
    from mlx_adapters.cli.train import run
    from mlx_adapters.errors import OutputError
    from mlx_adapters.study import cells

    name = cell.id if cell else cells.BASE
    try:
        again = "Run the study again to go on"
        train, answer = partial(run, go_on=again), partial(run_task, go_on=again)
        result = cells.run_cell(study, cell, folder, train=train, answer=answer, warn=say)
    except (OutputError, typer.Exit):
        raise  # a full disk, or a folder of another study: the next cell would meet it too; or Ctrl-C
    except (AdaptersError, RuntimeError, ValueError, MemoryError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        say(f"FAILED {name}: {text}")
        method = cell.method if cell else "base"
        result = {"id": name, "status": "failed", "error": text, "method": method}
        cells.write_json(cells.cell_folder(folder, name) / "cell.json", result)
        return result
    say(", ".join(f"{score['task']} {score['accuracy']:.1%}" for score in result["scores"]))
    return result


def _fitting(study: "Study") -> int:
    """How many of the largest cell fit into the free memory."""
    from mlx_adapters import methods
    from mlx_adapters.study.cells import parameters
    from mlx_adapters.train import plan

    counts = parameters(study)
    largest = max(study.cells, key=lambda one: counts[one.id])
    method = methods.make(largest.method, largest.fields)
    predicted = plan.predict(study.model, method=method, config=largest.train)
    each = predicted.peak + plan.overhead([predicted])
    fitting = max(1, device.free_memory() // each)
    say(f"the largest cell takes {size(each)}: the free memory is enough for {fitting} at once")
    return fitting


def _at_once(left: "list[Cell | None]", folder: Path, jobs: int) -> None:
    """Each cell in a process of its own, `jobs` at a time; what they say goes to `log.txt` of the cell."""
    from mlx_adapters.study import cells

    names = [one.id if one else cells.BASE for one in left]
    running: dict[str, subprocess.Popen[bytes]] = {}
    own = [*_arguments(), "--output", str(folder)]
    blas.warn_if_slow()
    # cells with as many threads as there are cores, each, would take them from each other
    environment = cores.share(jobs) | os.environ
    try:
        while names or running:
            while names and len(running) < jobs:
                name = names.pop(0)
                place = cells.cell_folder(folder, name)
                place.mkdir(parents=True, exist_ok=True)
                with (place / "log.txt").open("ab") as log:
                    running[name] = children.start(
                        "mlx_adapters.cli.app",
                        [*own, "--cell", name],
                        env=environment,
                        stdout=log,
                        stderr=log,
                    )
                say(f"{name}: started")
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    _settled(folder, name, process.returncode)
            time.sleep(0.2)
    except KeyboardInterrupt:
        say("stopping: the cells save what they have")
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait()
        raise


def _settled(folder: Path, name: str, code: int) -> None:
    from mlx_adapters.study import cells

    result = cells.finished(folder, name)
    log = cells.cell_folder(folder, name) / "log.txt"
    if result is None or (code != 0 and result["status"] == "done"):
        lines = log.read_text(errors="replace").strip().splitlines()
        error = f"the process ended with code {code}: {lines[-1] if lines else 'it said nothing'}"
        result = {"id": name, "status": "failed", "error": error, "method": name.partition("-")[0]}
        cells.write_json(cells.cell_folder(folder, name) / "cell.json", result)
    say(f"{name}: {result['status']}" + (f" ({result['error']})" if "error" in result else ""))


def _arguments() -> list[str]:
    """This call's arguments without those that a single cell must not get."""
    kept, skip = [], False
    for argument in sys.argv[1:]:
        if skip:
            skip = False
        elif argument in ("--output", "--jobs"):
            skip = True
        elif not argument.startswith(("--output=", "--jobs=")):
            kept.append(argument)
    return kept


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
