"""What a run reports after each step, and what it remembers from one step to the next."""

import math
from dataclasses import dataclass, field

from mlx_adapters.errors import TrainingError
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.units import size

__all__ = ["INTERRUPTED", "RECENT", "Progress", "Step", "StepOutcome"]

INTERRUPTED = "interrupted"  # the `stopped` of a run that was asked to end
RECENT = 20  # steps whose mean a spike is measured against
_PATIENCE = 10  # bad steps one after the other that end a run in any case


@dataclass(frozen=True)
class StepOutcome:
    """What `train_step` found. `good` tells whether it changed anything, `stopped` whether the run shall end
    because one of its processes was asked to."""

    loss: float
    grad_norm: float
    good: bool
    stopped: bool


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        step: its number, from 1 on.
        total: how many steps the run has.
        epoch: passes over the data so far; 1.5 is the middle of the second.
        loss: mean cross entropy per supervised token, in nats.
        lr: the learning rate of this step.
        grad_norm: norm of the gradient before clipping.
        tokens: how many tokens were read, without padding.
        seconds: what the step took, without validation.
        tokens_per_second: `tokens` divided by `seconds`.
        memory: peak of MLX's arrays so far, in bytes.
        validation_loss: as `loss`, of the validation rows, where a validation followed the step.
        skipped: whether the step was bad, so that it changed nothing.
        stopped: why the run ended early with this step; None otherwise.
    """

    step: int
    total: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    tokens_per_second: float
    memory: int
    validation_loss: float | None = None
    skipped: bool = False
    stopped: str | None = None

    def in_words(self) -> str:
        """What people read beside a bar: loss, rate, speed and memory."""
        speed = f"{self.tokens_per_second:.0f} tokens/s"
        return f"loss {self.loss:.4f}  lr {self.lr:.2g}  {speed}  memory {size(self.memory)}"

    def remarks(self) -> list[str]:
        """What was special about the step, a sentence for each: a validation, a bad loss."""
        found = []
        if self.validation_loss is not None:
            found.append(f"step {self.step}: validation loss {self.validation_loss:.4f}")
        if self.skipped:
            found.append(f"step {self.step}: skipped, its loss is {self.loss:.4f}")
        return found


@dataclass
class Progress:
    """What a run remembers besides arrays: the best validation and how many were worse since, the losses of
    the last steps, how many bad ones came in a row, and how many BLAS threads: it decides the last bits."""

    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0
    recent: list[float] = field(default_factory=list)
    bad: int = 0
    threads: int = 0

    def measured(self, step: int, loss: float) -> bool:
        """Note a validation; True where it is the best so far."""
        if self.best_loss is not None and not loss < self.best_loss:
            self.worse += 1
            return False
        self.best_loss, self.best_step, self.worse = loss, step, 0
        return True

    def max_loss(self, config: TrainConfig) -> float:
        """The largest loss that is not a spike."""
        if not config.spike or len(self.recent) < RECENT:
            return math.inf
        return config.spike * sum(self.recent) / len(self.recent)

    def judge(self, step: int, done: StepOutcome, config: TrainConfig) -> None:
        """Note the outcome of a step; TrainingError where it has to end the run."""
        if done.good:
            self.recent = [*self.recent, done.loss][-RECENT:]
            self.bad = 0
            return
        self.bad += 1
        if config.on_bad_step == "skip" and self.bad < _PATIENCE:
            return
        often = f" ({self.bad} bad steps in a row)" if self.bad > 1 else ""
        raise TrainingError(
            f"step {step}: the loss is {done.loss}, its gradient's norm {done.grad_norm}{often}. The "
            "checkpoint before is kept: lower --lr, look for odd rows in the data, or go on with "
            "--on-bad-step skip"
        )
