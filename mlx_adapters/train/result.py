"""What a training run came to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_adapters.errors import counted
from mlx_adapters.notebook import Picture, table

__all__ = ["PLOT", "TrainResult", "result_of"]

PLOT = "loss.png"  # in the adapter's folder


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to.

    Attributes:
        adapter: the folder of the saved adapter.
        method: the method's name.
        loss: of the step whose adapter was saved: mean cross entropy per supervised token, in nats.
        validation_loss: the same of the validation rows, where that step was followed by a validation.
        validation_loss_before: the same before the first step, to compare with.
        accuracy: the share of right answers in the test sets of `eval_task`, from 0 to 1, where they were
            asked after that step; of several sets the mean, each weighing the same.
        accuracy_before: the same before the first step.
        step: the step whose adapter was saved: the last, or that of the best validation.
        steps: how many steps the run took, with those before it was resumed.
        seconds: from the first step to the last, with validation, without those before it was resumed.
        metrics: one row per step, as in `metrics.jsonl`, without what was measured before the first.
        stopped: why the run ended early; None where it did not.
        trainable: how many parameters the adapter has.
        parameters: how many the model has with it.
        rows: how many rows were trained on.
    """

    adapter: Path
    method: str
    loss: float | None
    validation_loss: float | None
    step: int
    steps: int
    seconds: float
    metrics: list[dict[str, Any]]
    stopped: str | None
    trainable: int
    parameters: int
    rows: int
    validation_loss_before: float | None = None
    accuracy: float | None = None
    accuracy_before: float | None = None

    def plot(self) -> Picture:
        """The picture of the losses, `loss.png` in the adapter's folder; a notebook shows it."""
        return Picture(self.adapter / PLOT)

    def _repr_html_(self) -> str:
        numbers = {"loss": self.loss, "validation loss": self.validation_loss, "accuracy": self.accuracy}
        rows: list[tuple[str, object]] = [("adapter", self.adapter), ("method", self.method)]
        rows += [(name, f"{value:.4f}") for name, value in numbers.items() if value is not None]
        rows += [("steps", self.steps), ("trained on", counted(self.rows, "row"))]
        return table(("", ""), rows) + self.plot().inline()

    def remarks(self) -> list[str]:
        """What a user may not expect of the adapter: another step than the last, or no gain."""
        loss, before = self.validation_loss, self.validation_loss_before
        numbers = [] if loss is None else [f"validation loss {loss:.4f}"]
        numbers += [] if self.accuracy is None else [f"accuracy {self.accuracy:.1%}"]
        found = []
        if self.step != self.steps:
            found.append(", ".join([f"the adapter is that of step {self.step}", *numbers]))
        if loss is not None and before is not None and loss >= before:
            found.append(f"the validation loss was lower before training: {before:.4f}, now {loss:.4f}")
        right, first = self.accuracy, self.accuracy_before
        if right is not None and first is not None and right < first:
            found.append(f"more answers were right before training: {first:.1%}, now {right:.1%}")
        return found


def result_of(metrics: Sequence[dict[str, Any]], *, step: int, **facts: Any) -> TrainResult:
    """The result of a run whose adapter is that of `step`: its losses stand in `metrics`, the rows of
    `metrics.jsonl`; `facts` are the other fields."""
    rows = {row["step"]: row for row in metrics}
    before, row = rows.pop(0, {}), rows.get(step, {})
    losses: dict[str, Any] = {name: row.get(name) for name in ("loss", "validation_loss", "accuracy")}
    losses |= {f"{name}_before": before.get(name) for name in ("validation_loss", "accuracy")}
    return TrainResult(step=step, metrics=list(rows.values()), **losses, **facts)
