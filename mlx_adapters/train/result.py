"""What a training run came to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["TrainResult", "result_of"]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to.

    Attributes:
        adapter: the folder of the saved adapter.
        method: the method's name.
        loss: of the step whose adapter was saved: mean cross entropy per supervised token, in nats.
        validation_loss: the same of the validation rows, where that step was followed by a validation.
        step: the step whose adapter was saved: the last, or that of the best validation.
        steps: how many steps the run took, with those before it was resumed.
        seconds: from the first step to the last, with validation, without those before it was resumed.
        metrics: one row per step, as in `metrics.jsonl`.
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


def result_of(metrics: Sequence[dict[str, Any]], *, step: int, **facts: Any) -> TrainResult:
    """The result of a run whose adapter is that of `step`: its losses stand in `metrics`, the rows of
    `metrics.jsonl`; `facts` are the other fields."""
    row = next((row for row in metrics if row["step"] == step), {})
    losses: dict[str, Any] = {name: row.get(name) for name in ("loss", "validation_loss")}
    return TrainResult(step=step, metrics=list(metrics), **losses, **facts)
