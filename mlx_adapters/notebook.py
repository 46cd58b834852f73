"""What a notebook shows: training as it goes on, and results as tables and pictures.

IPython is never required: it is there where a notebook runs.
"""

import base64
import html
import math
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["Live", "Picture", "in_notebook", "table"]

_EVERY = 0.3  # seconds between two pictures
_WIDE, _HIGH = 480, 90  # pixels of the curve
_POINTS = 240


def in_notebook() -> bool:
    """Whether this is a kernel that shows HTML: Jupyter, VS Code, Colab."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return type(shell).__name__ in ("ZMQInteractiveShell", "Shell")


class Live:
    """Training as it goes on: a bar, the last step in words, and the curve of the loss."""

    def __init__(self, total: int) -> None:
        self.total, self.losses = total, list[float]()
        self._id, self._shown = secrets.token_hex(8), 0.0

    def update(self, step: Any) -> None:
        """Show a `Step`; most are only remembered, so that drawing costs nothing."""
        screen: Any = import_module("IPython.display")

        self.losses.append(step.loss)
        now = time.monotonic()
        if self._shown and step.step < self.total and now - self._shown < _EVERY:
            return
        words = f"{step.step}/{self.total}  {step.in_words()}"
        bar = f'<progress value="{step.step}" max="{self.total}" style="width:{_WIDE}px"></progress>'
        content = {
            "text/plain": words,
            "text/html": f"{bar}<br>{html.escape(words)}<br>{_curve(self.losses)}",
        }
        (screen.update_display if self._shown else screen.display)(content, raw=True, display_id=self._id)
        self._shown = now


def _curve(losses: Sequence[float]) -> str:
    """The losses as an SVG line, in the colour of the text around it."""
    every = math.ceil(len(losses) / _POINTS) or 1
    means = [
        sum(part) / len(part) for part in (losses[at : at + every] for at in range(0, len(losses), every))
    ]
    found = [mean for mean in means if math.isfinite(mean)]
    if len(found) < 2:
        return ""
    low, high = min(found), max(found)
    across, up = _WIDE / (len(found) - 1), (_HIGH - 4) / ((high - low) or 1)
    points = " ".join(f"{n * across:.1f},{2 + (high - mean) * up:.1f}" for n, mean in enumerate(found))
    line = f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
    return f'<svg width="{_WIDE}" height="{_HIGH}" role="img" aria-label="loss">{line}</svg>'


@dataclass(frozen=True)
class Picture:
    """A PNG file, which a notebook shows."""

    path: Path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()

    def inline(self) -> str:
        """The picture as HTML, or nothing where the file is gone."""
        if not self.path.is_file():
            return ""
        data = base64.b64encode(self.path.read_bytes()).decode()
        return f'<img alt="{html.escape(self.path.name)}" width="480" src="data:image/png;base64,{data}">'


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as HTML, each cell as it is."""

    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(heads, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
