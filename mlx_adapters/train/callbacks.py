"""What a run tells its user on the way, and how the user stops it."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_adapters.train.progress import Measured, Step

if TYPE_CHECKING:
    from mlx_adapters.train.result import TrainResult

__all__ = ["Callback", "Started", "StopTraining", "Tokenizing", "callbacks_of", "continues", "tell_tokens"]


class StopTraining(Exception):
    """Raised in a callback: the run ends after this step, and is saved."""


class Callback:
    """Methods that a run calls; override those you need.

    Returning False from `on_step`, `on_validation` or `on_checkpoint`, or raising `StopTraining` there, ends
    the run after this step. The adapter and a checkpoint are saved, so that it can be resumed. Among several
    processes every one calls its own callbacks, and all of them end after the next step.
    """

    def on_tokens(self, done: int, rows: int) -> None:
        """While the rows of a large set become tokens: how many are `done`, every thousand of them."""

    def on_start(self, measured: Measured) -> None:
        """Before the first step, where something is measured: validation loss, right answers, samples."""

    def on_step(self, step: Step) -> bool | None:
        """After each optimizer step."""

    def on_validation(self, step: Step) -> bool | None:
        """After each validation: `step.validation_loss` is there."""

    def on_checkpoint(self, folder: Path) -> bool | None:
        """After each checkpoint, which is in `folder`."""

    def on_end(self, result: "TrainResult") -> None:
        """When the adapter is saved."""


class Tokenizing(Callback):
    """Says every ten seconds how many rows of a large set are tokenized."""

    def __init__(self, say: Callable[[str], None], every: float = 10.0) -> None:
        self._say, self._every, self._last = say, every, time.monotonic()

    def on_tokens(self, done: int, rows: int) -> None:
        """As of `Callback`."""
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self._say(f"tokenized {done:,} of {rows:,} rows")


class Started(Callback):
    """Says what was measured before the first step."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def on_start(self, measured: Measured) -> None:
        """As of `Callback`."""
        for sentence in measured.remarks():
            self._say(sentence)


class _OnStep(Callback):
    def __init__(self, function: Callable[[Step], bool | None]) -> None:
        self.on_step = function  # type: ignore[method-assign, assignment]


def callbacks_of(callbacks: Sequence[Callback | Callable[[Step], bool | None]]) -> list[Callback]:
    """Callbacks as objects. A function is called with every step."""
    return [each if isinstance(each, Callback) else _OnStep(each) for each in callbacks]


def tell_tokens(callbacks: Sequence[Callback]) -> Callable[[int, int], None]:
    """A function that tells all callbacks how many rows are tokenized."""

    def tell(done: int, rows: int) -> None:
        for callback in callbacks:
            callback.on_tokens(done, rows)

    return tell


def continues(callbacks: Sequence[Callback], step: Step, checkpoint: Path | None) -> bool:
    """Tell all callbacks what happened in a step; False where one of them ends the run."""
    answers: list[bool | None] = []
    for callback in callbacks:
        try:
            answers.append(callback.on_step(step))
            if step.validation_loss is not None:
                answers.append(callback.on_validation(step))
            if checkpoint is not None:
                answers.append(callback.on_checkpoint(checkpoint))
        except StopTraining:
            answers.append(False)
    return not any(answer is False for answer in answers)
