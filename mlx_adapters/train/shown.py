"""A run in Python, with progress on the screen where somebody looks at it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlx_adapters import screen
from mlx_adapters.notebook import Live, in_notebook
from mlx_adapters.train.progress import Step

__all__ = ["shown"]


@contextmanager
def shown(total: int, progress: bool | None) -> Iterator[Callable[[Step], None]]:
    """Inside, each `Step` that the function gets is shown: in a notebook as a bar and a curve, on a terminal
    as a bar, elsewhere as a line now and then. None: only in a notebook and on a terminal."""
    notebook = in_notebook()
    if progress is False or (progress is None and not notebook and not sys.stderr.isatty()):
        yield lambda step: None
    elif notebook:
        yield Live(total).update
    else:
        with screen.lines("train", total) as update:
            yield lambda step: update(step.step, step.in_words())
