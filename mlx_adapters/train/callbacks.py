"""What a run tells its user on the way, and how the user stops it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_adapters.train.progress import Step

if TYPE_CHECKING:
    from mlx_adapters.train.result import TrainResult

__all__ = ["Callback", "StopTraining", "callbacks_of", "continues"]


class StopTraining(Exception):
    """Raised in a callback: the run ends after this step, and is saved."""


class Callback:
    """Methods that a run calls; override those you need.

    Returning False from one of the first three, or raising `StopTraining` there, ends the run after this
    step. The adapter and a checkpoint are saved, so that it can be resumed. Among several processes every one
    calls its own callbacks, and all of them end after the next step.
    """

    def on_step(self, step: Step) -> bool | None:
        """After each optimizer step."""

    def on_validation(self, step: Step) -> bool | None:
        """After each validation: `step.validation_loss` is there."""

    def on_checkpoint(self, folder: Path) -> bool | None:
        """After each checkpoint, which is in `folder`."""

    def on_end(self, result: "TrainResult") -> None:
        """When the adapter is saved."""


class _OnStep(Callback):
    def __init__(self, function: Callable[[Step], bool | None]) -> None:
        self.on_step = function  # type: ignore[method-assign, assignment]


def callbacks_of(callbacks: Sequence[Callback | Callable[[Step], bool | None]]) -> list[Callback]:
    """Callbacks as objects. A function is called with every step."""
    return [each if isinstance(each, Callback) else _OnStep(each) for each in callbacks]


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
