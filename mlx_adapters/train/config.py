"""The settings of a training run. The command line, YAML and the saved metadata all follow from the fields."""

from dataclasses import dataclass
from typing import Any

from mlx_adapters.errors import ConfigError, unknown
from mlx_adapters.methods.base import field
from mlx_adapters.train.schedule import SCHEDULES

__all__ = ["TrainConfig"]

# (field, lowest allowed value, whether that value itself is allowed)
_LIMITS: tuple[tuple[str, float, bool], ...] = (
    ("epochs", 1, True),
    ("steps", 1, True),
    ("batch_size", 1, True),
    ("accumulation", 1, True),
    ("lr", 0, False),
    ("warmup", 0, True),
    ("weight_decay", 0, True),
    ("clip", 0, True),
    ("seed", 0, True),
    ("cutoff", 2, True),
    ("validation", 0, True),
    ("eval_every", 0, True),
    ("save_every", 0, True),
    ("keep", 1, True),
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. ConfigError lists every value out of range."""

    epochs: int = field(3, "passes over the data")
    steps: int | None = field(None, "optimizer steps; replaces epochs")
    batch_size: int = field(8, "examples per forward pass")
    accumulation: int = field(1, "batches per optimizer step, weighted by their tokens")
    lr: float = field(3e-4, "peak learning rate of AdamW")
    warmup: int = field(10, "steps of linear warm-up, at most half of the run")
    schedule: str = field("linear", f"after the warm-up: {', '.join(SCHEDULES)}")
    weight_decay: float = field(0.0, "AdamW's decoupled weight decay")
    clip: float = field(1.0, "largest norm of the gradient; 0 switches clipping off")
    seed: int = field(0, "seed of the order of the data and of dropout")
    cutoff: int = field(256, "tokens an example may have; longer ones are cut")
    validation: int = field(0, "examples held out for the validation loss")
    eval_every: int = field(0, "steps between validation losses; 0: at the end of each epoch")
    save_every: int = field(100, "steps between checkpoints; 0: only at the end")
    keep: int = field(2, "checkpoints to keep")

    def __post_init__(self) -> None:
        problems = [p for row in _LIMITS if (p := self._problem(*row))]
        if self.schedule not in SCHEDULES:
            problems.append(unknown("schedule", self.schedule, SCHEDULES))
        if problems:
            raise ConfigError("; ".join(problems))

    def _problem(self, name: str, lowest: float, inclusive: bool) -> str | None:
        value: Any = getattr(self, name)
        # written so that nan fails too
        if value is None or ((value >= lowest if inclusive else value > lowest) and value < float("inf")):
            return None
        return f"{name}={value} must be {'at least' if inclusive else 'greater than'} {lowest}"
