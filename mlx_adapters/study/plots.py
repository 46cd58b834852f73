"""The pictures of a study, as PNG."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_adapters.study.cells import BASE
from mlx_adapters.train import metrics

__all__ = ["draw"]

_COLOURS = ("#1f5fa8", "#c8501e", "#2f8f5b", "#8a4fa3", "#b8860b", "#4a4a4a", "#c23b6e", "#2aa1b3")
Result = dict[str, Any]


def draw(results: Sequence[Result], adapters: Mapping[str, Path]) -> dict[str, bytes]:
    """{title: PNG} of accuracy by placement, by size and by trainable parameters, and of the losses; those
    that would be empty are left out."""
    done = [row for row in results if row["status"] == "done"]
    cells = [row for row in done if row["id"] != BASE]
    base = next((row["average"]["accuracy"] for row in done if row["id"] == BASE), None)
    losses = {row["id"]: metrics.read(adapters[row["id"]] / "metrics.jsonl") for row in cells}
    placed = [row for row in cells if row["placement"]]
    sized = [row for row in cells if row["size"]]
    pictures: dict[str, Callable[[Any], None]] = {}
    if placed:
        pictures["accuracy by placement"] = lambda axes: _names(axes, placed, "placement", base)
    if sized:
        pictures["accuracy by size"] = lambda axes: _names(axes, sized, "size", base)
    if cells:
        pictures["accuracy by trainable parameters"] = lambda axes: _parameters(axes, cells, base)
    if any(losses.values()):
        pictures["training loss"] = lambda axes: _losses(axes, losses)
    return {title: _png(paint) for title, paint in pictures.items()}


def _png(paint: Callable[[Any], None]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    paint(axes)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=130, format="png")
    return stream.getvalue()


def _points(axes: Any, rows: Sequence[Result], x: Sequence[float], method: str, colour: str) -> None:
    shares = [row["average"] for row in rows]
    y = [100 * share["accuracy"] for share in shares]
    below = [100 * (share["accuracy"] - share["low"]) for share in shares]
    above = [100 * (share["high"] - share["accuracy"]) for share in shares]
    style = {"fmt": "o", "color": colour, "label": method, "capsize": 3, "markersize": 6, "linewidth": 1}
    axes.errorbar(x, y, yerr=[below, above], **style)


def _by_method(rows: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


def _names(axes: Any, rows: Sequence[Result], key: str, base: float | None) -> None:
    """Methods side by side at each name of `key`."""
    names = list(dict.fromkeys(row[key] for row in rows))
    methods = _by_method(rows)
    for number, (method, own) in enumerate(methods.items()):
        shift = (number - (len(methods) - 1) / 2) * 0.12
        # cells of one name that differ otherwise stand a little apart
        count = [sum(o[key] == r[key] for o in own[:i]) for i, r in enumerate(own)]
        x = [names.index(row[key]) + shift + 0.03 * again for row, again in zip(own, count)]
        _points(axes, own, x, method, _COLOURS[number % len(_COLOURS)])
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=8)
    axes.set(ylabel="accuracy, % (95 % interval)", xlim=(-0.6, len(names) - 0.4))
    _base(axes, base)


def _parameters(axes: Any, rows: Sequence[Result], base: float | None) -> None:
    for number, (method, own) in enumerate(_by_method(rows).items()):
        x = [row["trainable"] for row in own]
        _points(axes, own, x, method, _COLOURS[number % len(_COLOURS)])
    axes.set(xlabel="trainable parameters", ylabel="accuracy, % (95 % interval)", xscale="log")
    _base(axes, base)


def _base(axes: Any, base: float | None) -> None:
    if base is not None:
        axes.axhline(100 * base, color="#888", linestyle="--", linewidth=1, label="base model")
    axes.set_ylim(bottom=0)


def _losses(axes: Any, losses: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    for number, (name, rows) in enumerate(losses.items()):
        style = "-" if number < len(_COLOURS) else "--"
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], style, color=colour, label=name)
    axes.set(xlabel="step", ylabel="loss per supervised token")
    axes.set_ylim(bottom=0)
