"""The record of a run: one JSON line per step, and a picture of the losses."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_adapters.errors import writing_to
from mlx_adapters.files.writing import write_whole
from mlx_adapters.train.progress import Step

__all__ = ["append", "forget_after", "plot", "read"]


def append(file: Path, step: Step) -> None:
    """Add one line; it is on disk before the next step begins."""
    with writing_to(file), file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({k: v for k, v in asdict(step).items() if v is not None}) + "\n")


def forget_after(file: Path, step: int) -> None:
    """Drop the lines of later steps, which a resumed run takes again. A kill here loses no line."""
    rows = read(file, before=step)
    with writing_to(file):
        write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))


def read(file: Path, *, before: int | None = None) -> list[dict[str, Any]]:
    """The recorded steps, each once (the latest), up to step `before`."""
    steps: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # a line cut off by a kill
            continue
        steps[row["step"]] = row
    return [steps[number] for number in sorted(steps) if before is None or number <= before]


def plot(rows: Sequence[dict[str, Any]], file: Path, *, title: str) -> None:
    """Draw training and validation loss against the step as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    axes.plot(steps, losses, color="#9bbbe0", linewidth=1, label="each step")
    axes.plot(steps, _smooth(losses), color="#1f5fa8", linewidth=2, label="smoothed")
    measured = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    if measured:
        axes.plot(*zip(*measured), color="#c8501e", marker="o", linewidth=1.5, label="validation")
    axes.set(xlabel="step", ylabel="loss per supervised token", title=title, ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    temporary = file.with_name("." + file.name)
    figure.savefig(temporary, dpi=130, format="png")
    pyplot.close(figure)
    temporary.replace(file)


def _smooth(values: Sequence[float], share: float = 0.9) -> list[float]:
    """Exponential average, corrected for its start."""
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = share * total + (1 - share) * value, share * weight + 1 - share
        smooth.append(total / weight)
    return smooth
