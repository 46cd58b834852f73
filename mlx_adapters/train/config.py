"""The settings of a training run: flags, YAML's keys and the saved record are these fields."""

import math
from dataclasses import dataclass, replace

from mlx_adapters.data.showing import LONG_ROWS, LOSS_ON
from mlx_adapters.errors import ConfigError, unknown
from mlx_adapters.fields import field
from mlx_adapters.files.documents import json_option

__all__ = [
    "BAD_STEP",
    "BEST_BY",
    "COMPILE",
    "NOTHING_TO_JUDGE",
    "OPTIMIZER_NAMES",
    "SCHEDULES",
    "TrainConfig",
]

SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZER_NAMES = ("adamw", "adam", "lion", "adafactor", "muon", "sgd")
BAD_STEP = ("stop", "skip")
COMPILE = ("auto", "on", "off")
BEST_BY = ("loss", "accuracy")
NOTHING_TO_JUDGE = "patience and best need rows to measure on: give validation, or eval_task"


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
    template: str | None = field(
        None, "alpaca, llm-adapters, chat, plain or a FILE.jinja [default: what suits the data]"
    )
    chat_template_kwargs: str | None = field(
        None, """chat template variables, as JSON: '{"enable_thinking": false}'; those of a row win"""
    )
    loss_on: str = field(
        "completion", "completion: all answers of a chat; last: its last answer; all: the prompt too"
    )
    validation: str | int | float | None = field(
        None,
        "what the loss is measured on: N rows held out, a fraction of them (0.05), a file, the name of a "
        "part of the data (dev), or 0 for nothing [default: the file valid of a data folder]",
    )
    validation_limit: int | None = field(
        None, "measure on N rows of that file, drawn by the seed [default: all; of a folder's own file 200]"
    )
    validate_every: int = field(50, "steps between two validations")
    eval_task: str | None = field(
        None, "measure accuracy while training on these test sets: SVAMP,gsm8k, or a file of your own"
    )
    eval_every: int | None = field(None, "steps between two such tests [default: that of the validations]")
    eval_limit: int = field(100, "items of each test set, those that eval --limit draws")
    data_dir: str | None = field(None, "folder with NAME/test.json of the test sets [default: the hub]")
    eval_samples: str | int | None = field(
        None, "show answers to N validation prompts at each validation, or to the prompts in a file"
    )
    patience: int | None = field(None, "stop after this many measurements without a better one; implies best")
    best: bool = field(False, "finish with the adapter of the best measurement, not the last")
    best_by: str | None = field(
        None, "what is best: accuracy, or the validation loss [default: accuracy with eval_task, else loss]"
    )
    save_every: int = field(50, "steps between two checkpoints")
    keep: int = field(2, "checkpoints kept")
    columns: str | None = field(
        None, "names of the rows' fields, where they are others: prompt=question,completion=answer"
    )
    limit: int | None = field(None, "use only the first N rows")
    streaming: bool = field(
        False, "read hub datasets only as far as the steps go, without downloading them whole; needs steps"
    )
    weights: str | None = field(
        None,
        "with several --data: their shares of what is learned, as 3,1 [default: every row once an epoch]",
    )
    project: str | None = field(None, "project of --log wandb and trackio [default: mlx-adapters]")
    run_name: str | None = field(None, "name of the run there [default: the output folder's]")
    tags: str | None = field(None, "tags of the run there, joined by commas")

    def __post_init__(self) -> None:
        for name in ("validation", "eval_samples"):  # a number in the text of an option is a number
            object.__setattr__(self, name, _number(getattr(self, name)))
        problems = [
            f"{name}={getattr(self, name)} must be at least {least}"
            for name, least in _LEAST.items()
            if isinstance(getattr(self, name), int | float) and getattr(self, name) < least
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
        problems += _of_measuring(self)
        if self.loss_on not in LOSS_ON:
            problems.append(unknown("value of loss-on", self.loss_on, LOSS_ON))
        if self.long_rows not in LONG_ROWS:
            problems.append(unknown("value of long-rows", self.long_rows, LONG_ROWS))
        if self.router_aux_loss and self.gradient_checkpointing:
            problems.append(
                "router_aux_loss needs the routers' activations: leave gradient_checkpointing off"
            )
        json_option(self.chat_template_kwargs, "--chat-template-kwargs")
        if self.streaming and not self.steps:
            problems.append("streaming reads as many rows as the steps take: give steps too")
        if problems:
            raise ConfigError("; ".join(problems))

    def streamed(self, processes: int) -> int | None:
        """How many rows to read of a dataset that is streamed: as many as the steps take. None: all."""
        if not self.streaming:
            return None
        held_out = self.validation if isinstance(self.validation, int) else 0
        return (self.steps or 0) * self.batch_size * self.accumulation * processes + held_out

    def shared(self, processes: int) -> "TrainConfig":
        """The settings of one of the processes that share every batch: its part of the rows."""
        if self.batch_size % processes:
            raise ConfigError(f"batch_size={self.batch_size} must be a multiple of processes={processes}")
        return replace(self, batch_size=self.batch_size // processes)

    @property
    def judged_by(self) -> str:
        """What the best measurement is chosen by: `accuracy` or `loss`."""
        return self.best_by or ("accuracy" if self.eval_task else "loss")


def _number(value: str | int | float | None) -> str | int | float | None:
    """A text that is a number, as the number."""
    for kind in (int, float):
        try:
            return kind(value) if isinstance(value, str) else value
        except ValueError:
            continue
    return value


def _of_measuring(config: TrainConfig) -> list[str]:
    """What is wrong with the settings of what is measured while training."""
    problems = []
    share, task = config.validation, config.eval_task
    if isinstance(share, float) and not 0 < share < 1:
        problems.append(f"validation={share} must be a number of rows, or a fraction between 0 and 1")
    if isinstance(config.eval_samples, float):
        problems.append(f"eval_samples={config.eval_samples} must be a whole number, or a file of prompts")
    if config.best_by is not None and config.best_by not in BEST_BY:
        problems.append(unknown("value of best-by", config.best_by, BEST_BY))
    if config.best_by == "accuracy" and not task:
        problems.append("best_by=accuracy needs test sets: give eval_task too")
    if config.eval_every is not None and not task:
        problems.append("eval_every needs test sets: give eval_task too")
    if (config.patience or config.best) and share == 0 and (config.judged_by == "loss"):
        problems.append(NOTHING_TO_JUDGE)
    return problems


_LEAST = {
    "epochs": 1,
    "steps": 1,
    "batch_size": 1,
    "accumulation": 1,
    "warmup": 0,
    "seed": 0,
    "max_length": 2,
    "validation": 0,
    "validation_limit": 1,
    "validate_every": 1,
    "eval_every": 1,
    "eval_limit": 1,
    "eval_samples": 1,
    "patience": 1,
    "save_every": 1,
    "keep": 1,
    "limit": 1,
}
