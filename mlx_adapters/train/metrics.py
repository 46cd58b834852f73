"""The record of a run: one JSON line per step, and a plot of the loss."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from mlx_adapters.errors import DataError
from mlx_adapters.train.loop import Step

__all__ = ["Metrics", "plot", "read"]


class Metrics:
    """Writes `metrics.jsonl`. A resumed run continues the file: lines from its first step on are replaced."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._stream: IO[str] | None = None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: Step) -> None:
        """Append one step; it is on disk when this returns, so that a killed run leaves its record."""
        if self._stream is None:
            self._stream = self._open(step.step)
        self._stream.write(json.dumps(asdict(step)) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self, first: int) -> IO[str]:
        earlier = (
            [row for row in read(self.file) if row["step"] < first]
            if first > 1 and self.file.exists()
            else []
        )
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name("." + self.file.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in earlier), encoding="utf-8")
        temporary.replace(self.file)
        return self.file.open("a", encoding="utf-8")


def read(file: Path) -> list[dict[str, Any]]:
    """The steps in a metrics file. A last line that a killed run left half written is ignored."""
    rows: list[dict[str, Any]] = []
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise DataError(
                    f"{file}:{number}: is not JSON. Delete the file to start a new record"
                ) from None
    return rows


def plot(metrics: Path, png: Path) -> Path:
    """Draw training and validation loss over the steps of a metrics file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read(metrics)
    # Figure without pyplot: no global state, no display, safe in any thread
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    smooth = _smooth(losses)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
    axes.plot(steps, smooth, color="tab:blue", linewidth=1.8, label="training, moving average")
    held = [(row["step"], row["validation_loss"]) for row in rows if row["validation_loss"] is not None]
    if held:
        axes.plot(*zip(*held), color="tab:orange", marker="o", markersize=4, label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss per supervised token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(png)
    return png


def _smooth(values: list[float]) -> list[float]:
    """Mean of the last twentieth of the run, at least 5 steps."""
    width = max(5, len(values) // 20)
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
