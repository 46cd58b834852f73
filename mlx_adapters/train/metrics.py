"""The record of a run: a JSON line per step, and a picture of the losses and of the right answers."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_adapters.errors import writing_to
from mlx_adapters.files.writing import write_whole

__all__ = ["append", "forget_after", "plot", "read", "smoothed"]

Row = dict[str, Any]

_BLUE, _PALE, _ORANGE, _GREEN = "#1f5fa8", "#a9c4e4", "#c8501e", "#2f7d3a"
_POINTS = 300  # of the smoothed line: more than a picture can show
# large letters and white behind them: read at 400 pixels too, and on a dark page
_STYLE: dict[str, Any] = {
    "font.size": 13,
    "axes.titlesize": 13,
    "legend.fontsize": 11,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def append(file: Path, rows: Iterable[Row]) -> None:
    """Add a line for each row; they are on disk before the next step begins. No row makes no file."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if text:
        with writing_to(file), file.open("a", encoding="utf-8") as stream:
            stream.write(text)


def forget_after(file: Path, step: int) -> None:
    """Drop the lines of later steps, which a resumed run takes again. A kill here loses no line."""
    if not file.exists():
        return
    rows = [row for row in _lines(file) if row["step"] <= step]
    with writing_to(file):
        write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))


def read(file: Path) -> list[Row]:
    """The recorded steps, each once (the latest). Step 0 is what was measured before the first."""
    steps: dict[int, Row] = {}
    for row in _lines(file):  # a resumed run may measure a step that was recorded without
        steps[row["step"]] = steps.get(row["step"], {}) | row
    return [steps[number] for number in sorted(steps)]


def _lines(file: Path) -> list[Row]:
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # a line cut off by a kill
            continue
    return found


def plot(rows: Sequence[Row], file: Path, *, title: str) -> None:
    """Draw what `metrics.jsonl` holds against the step as a PNG: training and validation loss, and below them
    the share of right answers where test sets were asked."""
    # without pyplot, whose backend is a notebook's to choose
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    asked = [row for row in rows if row.get("accuracy") is not None]
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 5.6 if asked else 4), layout="constrained")
        found = figure.subplots(
            2 if asked else 1,
            sharex=True,
            squeeze=False,
            height_ratios=(3, 2) if asked else None,
        )
        axes = [each[0] for each in found]
        _losses(axes[0], rows)
        if asked:
            _accuracies(axes[1], asked)
        axes[0].set_title(title, loc="left")
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for each in axes:
            each.grid(alpha=0.25)
            each.spines[["top", "right"]].set_visible(False)
        temporary = file.with_name("." + file.name)
        figure.savefig(temporary, dpi=130, format="png")
    temporary.replace(file)


def _losses(axes: Any, rows: Sequence[Row]) -> None:
    taken = [(row["step"], row["loss"]) for row in rows if math.isfinite(row.get("loss", math.nan))]
    measured = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    if taken:
        steps, losses = (np.array(each, dtype=float) for each in zip(*taken, strict=True))
        axes.plot(steps, losses, color=_PALE, linewidth=1)
        axes.plot(*smoothed(steps, losses), color=_BLUE, linewidth=2.5, label="training")
    if measured:
        axes.plot(*zip(*measured, strict=True), color=_ORANGE, marker="o", linewidth=2, label="validation")
    axes.set(ylabel="loss per token", ylim=(0, None))
    if taken or measured:
        axes.legend(frameon=False)


def _accuracies(axes: Any, rows: Sequence[Row]) -> None:
    for number, task in enumerate(rows[-1].get("accuracies") or {}):
        points = [(row["step"], 100 * row["accuracies"][task]) for row in rows if task in row["accuracies"]]
        style = ("-", "--", ":", "-.")[number % 4]
        axes.plot(*zip(*points, strict=True), style, color=_GREEN, marker="o", linewidth=2, label=task)
    axes.set(ylabel="right, %", ylim=(0, 105), yticks=(0, 25, 50, 75, 100))
    axes.legend(frameon=False)


def smoothed(steps: np.ndarray, values: np.ndarray, share: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """A smooth line through `values`: (its steps, its values). It does not lag behind them.

    Each of its points lies on the straight line that fits the values around it best, weighted by a Gaussian
    whose standard deviation is `share` of all steps (local linear regression): a mean of the values before
    a point would follow a falling loss late, and a mean of those around it would bend at both ends.
    """
    places = steps if len(steps) <= _POINTS else np.linspace(steps[0], steps[-1], _POINTS)
    width = max(1.0, share * (steps[-1] - steps[0]))
    found = []
    for place in places:
        near = np.abs(steps - place) <= 4 * width
        away, near_values = (steps[near] - place) / width, values[near]
        weight = np.exp(-0.5 * away**2)
        s0, s1, s2 = (float(np.sum(weight * away**power)) for power in range(3))
        t0, t1 = (float(np.sum(weight * near_values * away**power)) for power in range(2))
        scale = s0 * s2 - s1 * s1
        found.append((s2 * t0 - s1 * t1) / scale if scale > 1e-9 * s0 * s0 else t0 / s0)
    return places, np.array(found)
