"""What a run reports after each step, and what it remembers from one step to the next."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_adapters.errors import TrainingError
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.units import size

__all__ = ["INTERRUPTED", "RECENT", "Measured", "Progress", "Sample", "Step", "StepOutcome"]

INTERRUPTED = "interrupted"  # the `stopped` of a run that was asked to end
RECENT = 20  # steps whose mean a spike is measured against
_PATIENCE = 10  # bad steps one after the other that end a run in any case
_SAME = 1e-6  # accuracies that differ by less are equal: several processes exchange them in float32
_SHOWN = 100  # characters of a prompt or an answer that a line shows


@dataclass(frozen=True)
class StepOutcome:
    """What `train_step` found. `good` tells whether it changed anything, `stopped` whether the run shall end
    because one of its processes was asked to."""

    loss: float
    grad_norm: float
    good: bool
    stopped: bool


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The model's `answer` to a prompt; `expected` is that of the validation row, "" where there is none."""

    prompt: str
    answer: str
    expected: str = ""

    def in_words(self) -> str:
        """One line: the end of the prompt, the answer, and the expected answer where it is another."""
        expected = "" if self.expected in ("", self.answer) else f", expected {_short(self.expected)}"
        return f"{_short(self.prompt, end=True)} -> {_short(self.answer)}{expected}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured at a step.

    Attributes:
        step: after how many steps; 0 is before the first.
        validation_loss: mean cross entropy per supervised token of the validation rows, in nats, where a
            validation followed the step.
        accuracy: the share of right answers in the test sets, from 0 to 1, where they were asked; of several
            sets the mean, each weighing the same.
        accuracies: the same of each test set, by its name.
        samples: answers to a few prompts, where they were asked for.
    """

    step: int
    validation_loss: float | None = None
    accuracy: float | None = None
    accuracies: dict[str, float] | None = None
    samples: tuple[Sample, ...] = ()

    @property
    def anything(self) -> bool:
        """Whether anything was measured."""
        return self.validation_loss is not None or self.accuracy is not None or bool(self.samples)

    def record(self) -> dict[str, Any]:
        """The fields that have a value, as a line of `metrics.jsonl`; samples have a file of their own."""
        return {k: v for k, v in asdict(self).items() if v is not None and k != "samples"}

    def remarks(self) -> list[str]:
        """A sentence for what was measured, and one for each sample."""
        when = f"step {self.step}" if self.step else "before the first step"
        numbers = [] if self.validation_loss is None else [f"validation loss {self.validation_loss:.4f}"]
        numbers += [f"accuracy on {task} {share:.1%}" for task, share in (self.accuracies or {}).items()]
        found = [f"{when}: {', '.join(numbers)}"] if numbers else []
        return found + [f"{when}: {sample.in_words()}" for sample in self.samples]


@dataclass(frozen=True, kw_only=True)
class Step(Measured):
    """One optimizer step, and what was measured after it.

    Attributes:
        total: how many steps the run has.
        epoch: passes over the data so far; 1.5 is the middle of the second.
        loss: mean cross entropy per supervised token, in nats.
        lr: the learning rate of this step.
        grad_norm: norm of the gradient before clipping.
        tokens: how many tokens were read, without padding.
        seconds: what the step took, without validation.
        tokens_per_second: `tokens` divided by `seconds`.
        memory: peak of MLX's arrays so far, in bytes.
        skipped: whether the step was bad, so that it changed nothing.
        stopped: why the run ended early with this step; None otherwise.
    """

    total: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    tokens_per_second: float
    memory: int
    skipped: bool = False
    stopped: str | None = None

    def in_words(self) -> str:
        """What people read beside a bar, the most important first: a narrow terminal shows less of it."""
        speed = f"{self.tokens_per_second:.0f} tokens/s"
        memory = f"memory {size(self.memory)}"
        return f"epoch {self.epoch:.1f}  loss {self.loss:.4f}  {speed}  lr {self.lr:.2g}  {memory}"

    def remarks(self) -> list[str]:
        """What was special about the step, a sentence for each: what was measured, a bad loss."""
        found = super().remarks()
        if self.skipped:
            found.append(f"step {self.step}: skipped, its loss is {self.loss:.4f}")
        return found


@dataclass
class Progress:
    """What a run remembers besides arrays: the best measurement, by validation loss or by accuracy, and how
    many were worse since, the losses of the last steps, how many bad ones came in a row, and how many BLAS
    threads: it decides the last bits. `unmeasured`: the run had to end while it measured its last step."""

    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0
    recent: list[float] = field(default_factory=list)
    bad: int = 0
    threads: int = 0
    best_accuracy: float | None = None
    unmeasured: bool = False

    def measured(self, found: Measured, by: str) -> bool:
        """Note a measurement; True where it is the best so far. Of equal accuracies the one with the lower
        validation loss is better, else the earlier."""
        value = found.accuracy if by == "accuracy" else found.validation_loss
        if value is None:
            return False
        if self.best_step and not self._better(found, by):
            self.worse += 1
            return False
        self.best_loss, self.best_accuracy = found.validation_loss, found.accuracy
        self.best_step, self.worse = found.step, 0
        return True

    def _better(self, found: Measured, by: str) -> bool:
        loss, best = found.validation_loss, self.best_loss
        lower = loss is not None and best is not None and loss < best
        if by == "loss" or found.accuracy is None or self.best_accuracy is None:
            return lower
        gain = found.accuracy - self.best_accuracy
        return gain > _SAME or (gain > -_SAME and lower)

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


def _short(text: str, *, end: bool = False) -> str:
    """A text in quotes on one line, its beginning or its `end`."""
    text = " ".join(text.split())
    if len(text) > _SHOWN:
        text = f"... {text[-_SHOWN:]}" if end else f"{text[:_SHOWN]} ..."
    return f'"{text}"'
