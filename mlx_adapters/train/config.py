"""The settings of a training run: flags, YAML's keys and the saved record are these fields."""

import math
from dataclasses import dataclass, replace

from mlx_adapters.data.showing import LONG_ROWS
from mlx_adapters.data.tokens import LOSS_ON
from mlx_adapters.errors import ConfigError, unknown
from mlx_adapters.fields import field

__all__ = ["BAD_STEP", "COMPILE", "OPTIMIZER_NAMES", "SCHEDULES", "TrainConfig"]

SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZER_NAMES = ("adamw", "adam", "lion", "adafactor", "muon", "sgd")
BAD_STEP = ("stop", "skip")
COMPILE = ("auto", "on", "off")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Epochs and rate default to the paper's."""

    epochs: int | None = field(
        None, "passes over the data [default: 3, more for few rows]", "num_train_epochs"
    )
    steps: int | None = field(None, "optimizer steps; overrides epochs", "iters", "max_steps")
    batch_size: int = field(8, "rows per forward pass")
    accumulation: int = field(1, "forward passes per optimizer step", "gradient_accumulation_steps")
    packing: bool = field(False, "fill rows of `max_length` tokens with several examples, kept apart")
    gradient_checkpointing: bool = field(
        False, "compute blocks again instead of keeping their activations: less memory", "grad_checkpoint"
    )
    compile: str = field(
        "auto", "compile the step: on, off or auto (on a GPU); on a CPU it takes g++ and memory"
    )
    optimizer: str = field("adamw", f"{', '.join(OPTIMIZER_NAMES)}; lion wants a tenth of adamw's rate")
    optimizer_args: str | None = field(None, "its other arguments, for example momentum=0.9,betas=0.9:0.95")
    lr: float = field(3e-4, "peak learning rate", "learning_rate")
    rates: str | None = field(
        None, "learning-rate multipliers by an array's name or path: lora_b=16,*.0.*=0.5"
    )
    warmup: int | None = field(None, "steps of linear warm-up [default: a tenth of them, at most 10]")
    schedule: str = field("linear", "after the warm-up: linear or cosine to zero, or constant")
    weight_decay: float = field(0.0, "weight decay")
    no_decay: str | None = field("*bias,*norm*", "arrays without weight decay, by name, path or kind")
    clip: float = field(1.0, "largest norm of the gradient; 0 for no limit")
    on_bad_step: str = field("stop", "a step whose loss is not a number, or a spike: stop, or skip it")
    spike: float = field(0.0, "a loss this many times the mean of the last 20 steps is bad too; 0 for never")
    neftune: float = field(0.0, "NEFTune's alpha: noise on the embeddings while training")
    router_aux_loss: float = field(
        0.0, "weight of the loss that balances the experts of a mixture; transformers' router_aux_loss_coef"
    )
    seed: int = field(0, "seed of initialisation, data order and dropout")
    max_length: int | None = field(
        None,
        "longest row in tokens [default: all rows whole, as far as model and memory go]",
        *("cutoff", "max_seq_length"),
    )
    long_rows: str = field(
        "cut", "longer rows: cut their end, left (of the prompt), split (rows of text), or drop them"
    )
    template: str | None = field(None, "alpaca, llm-adapters, chat or plain [default: what suits the data]")
    loss_on: str = field(
        "completion", "completion: all answers of a chat; last: its last answer; all: the prompt too"
    )
    validation: int = field(0, "rows held out to measure the loss on")
    validate_every: int = field(50, "steps between two validations")
    patience: int | None = field(None, "stop after this many validations without a better loss; implies best")
    best: bool = field(False, "finish with the adapter of the best validation, not the last")
    save_every: int = field(50, "steps between two checkpoints")
    keep: int = field(2, "checkpoints kept")
    columns: str | None = field(
        None, "names of the rows' fields, where they are others: prompt=question,completion=answer"
    )
    limit: int | None = field(None, "use only the first N rows")
    weights: str | None = field(
        None,
        "with several --data: their shares of what is learned, as 3,1 [default: every row once an epoch]",
    )

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be at least {least}"
            for name, least in _LEAST.items()
            if getattr(self, name) is not None and getattr(self, name) < least
        ]
        problems += [
            f"{name}={getattr(self, name)} must be a finite number, 0 or more"
            for name in ("lr", "weight_decay", "clip", "spike", "neftune", "router_aux_loss")
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0)
        ]
        if self.schedule not in SCHEDULES:
            problems.append(unknown("schedule", self.schedule, SCHEDULES))
        if self.optimizer not in OPTIMIZER_NAMES:
            problems.append(unknown("optimizer", self.optimizer, OPTIMIZER_NAMES))
        if self.on_bad_step not in BAD_STEP:
            problems.append(unknown("value of on-bad-step", self.on_bad_step, BAD_STEP))
        if self.compile not in COMPILE:
            problems.append(unknown("value of compile", self.compile, COMPILE))
        if 0 < self.spike <= 1:
            problems.append(f"spike={self.spike} must be above 1, or 0")
        if (self.patience or self.best) and not self.validation:
            problems.append("patience and best need rows to measure on: give validation too")
        if self.loss_on not in LOSS_ON:
            problems.append(unknown("value of loss-on", self.loss_on, LOSS_ON))
        if self.long_rows not in LONG_ROWS:
            problems.append(unknown("value of long-rows", self.long_rows, LONG_ROWS))
        if self.router_aux_loss and self.gradient_checkpointing:
            problems.append(
                "router_aux_loss needs the routers' activations: leave gradient_checkpointing off"
            )
        if problems:
            raise ConfigError("; ".join(problems))

    def shared(self, processes: int) -> "TrainConfig":
        """The settings of one of the processes that share every batch: its part of the rows."""
        if self.batch_size % processes:
            raise ConfigError(f"batch_size={self.batch_size} must be a multiple of processes={processes}")
        return replace(self, batch_size=self.batch_size // processes)


_LEAST = {
    "epochs": 1,
    "steps": 1,
    "batch_size": 1,
    "accumulation": 1,
    "warmup": 0,
    "seed": 0,
    "max_length": 2,
    "validation": 0,
    "validate_every": 1,
    "patience": 1,
    "save_every": 1,
    "keep": 1,
    "limit": 1,
}
