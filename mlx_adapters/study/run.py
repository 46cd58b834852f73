"""A whole study: the cells that are left, in this process or side by side, and the report."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_adapters import device
from mlx_adapters.cpu.processes import run_each
from mlx_adapters.errors import counted, writing_to
from mlx_adapters.files.lock import locked
from mlx_adapters.study import report
from mlx_adapters.study.cells import (
    BASE,
    CellRun,
    Result,
    cell_folder,
    failure,
    finished,
    parameters,
    same_rules,
)
from mlx_adapters.study.grid import Cell, Study, read

__all__ = ["alone", "budgets", "fitting", "in_words", "left", "planned", "seconds", "side_by_side", "study"]


def study(
    source: Study | str | Path | Mapping[str, Any],
    output: str | Path,
    *,
    model: str | None = None,
    max_steps: int | None = None,
    limit: int | None = None,
) -> Iterator[Result]:
    """Train and measure the cells of a grid, one after the other, and write the report.

        for cell in study("study.yaml", "out"):
            print(cell["id"], cell["status"])

    Cells that an earlier run has finished are not run again. A cell that fails is a result too.

    Args:
        source: the study's YAML file, what such a file would hold, or what `study.grid.read` made of it.
        output: the folder for the cells, the tables and `report.html`.
        model: another model than the file's.
        max_steps: at most that many training steps per cell.
        limit: that many items of each test set.

    Yields: the result of each cell that is run, as its `cell.json` has it.

    Raises:
        ConfigError: a mistake in the file.
        OutputError: a folder that was made with other settings, or cannot be written.
    """
    if not isinstance(source, Study):
        source = read(source, model=model, max_steps=max_steps, limit=limit)
    folder = Path(output)
    with alone(folder):
        for cell in left(source, folder):
            yield _run(source, cell, folder)
        report.write(source, folder)


def _run(study: Study, cell: Cell | None, folder: Path) -> Result:
    """The result of a cell; nothing of its model stays in memory."""
    with CellRun(study, cell, folder) as run:
        for phase in run.phases():
            phase.run()
    return run.result or {}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other run writes to the folder, which is made. Raises OutputError where one does."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        yield


def left(study: Study, folder: Path) -> list[Cell | None]:
    """The cells without a result, the base model (None) first; OutputError where a result was read by other
    rules."""
    cells: list[Cell | None] = [*([None] if study.settings.base else []), *study.cells]
    found = []
    for cell in cells:
        name = cell.id if cell else BASE
        before = finished(folder, name)
        if before is None or before["status"] != "done":
            found.append(cell)
        else:
            same_rules(study, before, cell_folder(folder, name) / "cell.json")
    return found


def planned(study: Study) -> list[dict[str, Any]]:
    """What the cells are, with their trainable parameters; nothing is trained."""
    counts = parameters(study)
    return [
        {
            "id": cell.id,
            "trainable": counts[cell.id],
            "lr": cell.train.lr,
            "steps": cell.train.steps,
            "epochs": None if cell.train.steps else cell.train.epochs,
            "batch": cell.train.batch_size * cell.train.accumulation,
            "seed": cell.train.seed,
        }
        for cell in study.cells
    ]


def budgets(cells: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(heads, lines) of a table of what `planned` returns."""
    lines = []
    for cell in cells:
        steps, epochs = cell["steps"], cell["epochs"]
        budget = counted(steps, "step") if steps else counted(epochs, "epoch")
        own = (f"{cell['trainable']:,}", f"{cell['lr']:g}", budget, str(cell["batch"]), str(cell["seed"]))
        lines.append([cell["id"], *own])
    return ["cell", "trainable", "lr", "budget", "batch", "seed"], lines


def in_words(study: Study) -> str:
    """How many cells a study has, and what they are trained and tested on."""
    settings = study.settings
    items = f"at most {counted(settings.limit, 'item')} each" if settings.limit else "all items"
    cells = f"{counted(len(study.cells), 'cell')} on {study.model}"
    return f"{cells}: trained on {settings.data}, tested on {settings.tasks}, {items}"


def fitting(study: Study) -> tuple[int, int]:
    """(how many of the largest cell fit into the free memory, bytes of one)."""
    from mlx_adapters import methods
    from mlx_adapters.train import plan

    counts = parameters(study)
    largest = max(study.cells, key=lambda cell: counts[cell.id])
    method = methods.make(largest.method, largest.fields)
    predicted = plan.predict(study.model, method=method, config=largest.train)
    each = predicted.peak + plan.overhead([predicted])
    return max(1, device.free_memory() // each), each


def side_by_side(
    folder: Path, names: Sequence[str], command: Sequence[str], *, at_once: int, warn: Callable[[str], None]
) -> None:
    """Run these cells in processes, `at_once` at a time: each by the `command`, a module and its arguments,
    with `--cell NAME`. `warn` gets a line where one starts and ends."""
    module, *own = command
    jobs = [(name, [*own, "--cell", name], cell_folder(folder, name) / "log.txt") for name in names]
    stopping = "stopping: the cells save what they have"
    for name, code in run_each(module, jobs, at_once=at_once, warn=warn, stopping=stopping):
        if code is None:
            warn(f"{name}: started")
        else:
            result = ended(folder, name, code)
            warn(f"{name}: {result['status']}" + (f" ({result['error']})" if "error" in result else ""))


def seconds(results: Sequence[Result]) -> float:
    """What training and measuring these cells took."""
    return sum(row.get("train_seconds", 0.0) + row.get("eval_seconds", 0.0) for row in results)


def ended(folder: Path, name: str, code: int) -> Result:
    """The result of a cell whose process has ended with this code; a failure where it has left none."""
    result, log = finished(folder, name), cell_folder(folder, name) / "log.txt"
    if result is None or (code != 0 and result["status"] == "done"):
        lines = log.read_text(errors="replace").strip().splitlines()
        error = f"the process ended with code {code}: {lines[-1] if lines else 'it said nothing'}"
        result = failure(cell_folder(folder, name), name, error, method=name.partition("-")[0])
    return result
