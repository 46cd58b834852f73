"""The training loop: it yields one `Step` after each update; the caller logs, saves and stops."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_adapters import backend
from mlx_adapters.data.batches import Batch, batches
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import TrainingError, UnsupportedError
from mlx_adapters.train import checkpoint
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loss import Head, loss_sum, split_head, targets
from mlx_adapters.train.recompute import recompute_blocks

__all__ = ["Run", "Step", "learning_rate", "total_steps", "validate"]

# Settings that a resumed run must share: they decide the order of the data or the course of the rates.
_FIXED = (
    "epochs",
    "steps",
    "batch_size",
    "accumulation",
    "lr",
    "warmup",
    "schedule",
    "weight_decay",
    "clip",
    "seed",
)


@dataclass(frozen=True)
class Step:
    """One optimizer step. `loss` is the mean over its supervised tokens; `tokens` counts what is not
    padding, `tokens_per_second` from them; `memory` is the peak so far in bytes."""

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


def total_steps(examples: int, config: TrainConfig) -> int:
    """How many optimizer steps the run has."""
    micro = math.ceil(examples / config.batch_size)
    return config.steps or config.epochs * math.ceil(micro / config.accumulation)


def learning_rate(config: TrainConfig, total: int) -> Callable[[mx.array], mx.array] | float:
    """The rate by step, as transformers' schedules give it: a warm-up starts at 0, a decay ends at 0."""
    warmup = min(config.warmup, total)
    rest = max(1, total - warmup)
    after = {
        "linear": lambda: optim.linear_schedule(config.lr, 0.0, rest),
        "cosine": lambda: optim.cosine_decay(config.lr, rest),
        "constant": lambda: lambda step: mx.array(config.lr),
    }[config.schedule]()
    if not warmup:
        return after
    return optim.join_schedules([optim.linear_schedule(0.0, config.lr, warmup), after], [warmup])


def validate(model: nn.Module, examples: Sequence[Example], *, batch_size: int, pad_id: int) -> float:
    """Mean loss per supervised token over all `examples`, without dropout."""
    was_training = model.training
    model.eval()
    head = split_head(model)
    total, count = 0.0, 0
    for batch in batches(examples, batch_size=batch_size, pad_id=pad_id, shuffle=False):
        total += float(loss_sum(model, targets(batch), head=head, gradient=False))
        count += batch.targets
    model.train(was_training)
    return total / max(1, count)


class Run:
    """A training run over an attached adapter.

    `model` has frozen base weights; what `trainable_parameters()` returns is trained. With a `folder`,
    checkpoints go to `folder/checkpoints` every `config.save_every` steps, and `save()` writes one now.
    `identity` is what else a resumed run must share: the method and its fields, say. `rates` are factors on
    the learning rate of the trained arrays whose last name is the key.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        validation: Sequence[Example] = (),
        *,
        config: TrainConfig,
        pad_id: int = 0,
        folder: Path | None = None,
        identity: dict[str, Any] | None = None,
        rates: dict[str, float] | None = None,
    ) -> None:
        self.model, self.examples, self.validation = model, examples, validation
        self.config, self.pad_id, self.identity = config, pad_id, identity or {}
        self.folder = folder / "checkpoints" if folder else None
        self.rates = rates or {}
        self.total = total_steps(len(examples), config)
        if config.gradient_checkpointing:
            recompute_blocks(model)
        self.optimizer = optim.AdamW(
            learning_rate=learning_rate(config, self.total),
            weight_decay=config.weight_decay,
            bias_correction=True,  # MLX's default is off; torch and the paper have it
        )
        self.optimizer.init(model.trainable_parameters())
        self.step = 0
        self._head: Head | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes it."""
        fixed = {name: value for name, value in asdict(self.config).items() if name in _FIXED}
        return fixed | {"examples": len(self.examples), "data": _digest(self.examples), **self.identity}

    def save(self) -> Path | None:
        """Write a checkpoint of the last finished step; None without a folder."""
        if self.folder is None:
            return None
        return checkpoint.save(
            self.folder,
            self.model,
            self.optimizer,
            step=self.step,
            settings=self.settings,
            keep=self.config.keep,
        )

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to resume from."""
        return self.folder is not None and checkpoint.latest(self.folder) is not None

    def resume(self, warn: Callable[[str], None] = lambda message: None) -> int:
        """Go on from the newest checkpoint; returns its step. Raises TrainingError when there is none."""
        if self.folder is None:
            raise TrainingError("a run without a folder has nothing to resume from")
        self.step = checkpoint.restore(
            self.folder, self.model, self.optimizer, settings=self.settings, warn=warn
        )
        return self.step

    def __iter__(self) -> Iterator[Step]:
        """Train to the end, yielding after every step. Raises TrainingError when the loss is no number."""
        self.model.eval()  # with dropout on, the probe would find no head that agrees
        self._head = split_head(self.model)
        self.model.train()
        for epoch, window in self._windows():
            started = time.perf_counter()
            loss, norm, rate = self._update(window)
            self.step += 1
            seconds = time.perf_counter() - started
            tokens = sum(batch.tokens for batch in window)
            last = self.step == self.total
            validation = None
            if self.validation and (last or self.step % self.config.validate_every == 0):
                validation = validate(
                    self.model, self.validation, batch_size=self.config.batch_size, pad_id=self.pad_id
                )
            if last or self.step % self.config.save_every == 0:
                self.save()
            yield Step(
                step=self.step,
                total=self.total,
                epoch=epoch,
                loss=loss,
                lr=rate,
                grad_norm=norm,
                tokens=tokens,
                seconds=seconds,
                tokens_per_second=tokens / seconds,
                memory=backend.peak_memory(),
                validation_loss=validation,
            )
        self.model.eval()

    def _windows(self) -> Iterator[tuple[float, list[Batch]]]:
        """(epoch reached, the batches of one step), from the current step on."""
        position, epoch = 0, 0
        while position < self.total:
            order = batches(
                self.examples,
                batch_size=self.config.batch_size,
                pad_id=self.pad_id,
                seed=self.config.seed,
                epoch=epoch,
            )
            size = self.config.accumulation
            for first in range(0, len(order), size):
                position += 1
                if position > self.total:
                    return
                if position > self.step:
                    yield epoch + min(1.0, (first + size) / len(order)), order[first : first + size]
            epoch += 1

    def _update(self, window: list[Batch]) -> tuple[float, float, float]:
        # The noise of dropout follows from (seed, step): resuming repeats it, validation cannot shift it.
        mx.random.seed(self.config.seed * 1_000_003 + self.step)
        value_and_grad = nn.value_and_grad(self.model, self._loss)
        count = max(1, sum(batch.targets for batch in window))
        loss: mx.array | float = 0.0
        grads: Any = None
        for batch in window:
            value, grad = self._differentiated(value_and_grad, batch)
            grads = grad if grads is None else tree_map(mx.add, grads, grad)
            loss = loss + value
            mx.eval(loss, grads)
        # The mean over the whole step's targets: a batch with few of them does not weigh more per token.
        grads = tree_map(lambda g: g / count, grads)
        limit = self.config.clip or math.inf
        grads, norm = optim.clip_grad_norm(grads, limit)
        mean, norm_value = float(loss) / count, float(norm)
        if not (math.isfinite(mean) and math.isfinite(norm_value)):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {mean}, its gradient's norm {norm_value}. The checkpoint "
                "before is kept: lower --lr, or look for odd rows in the data"
            )
        before = dict(tree_flatten(self.model.trainable_parameters())) if self.rates else {}
        self.optimizer.update(self.model, grads)
        if self.rates:
            self._scale_update(before)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        return mean, norm_value, float(self.optimizer.learning_rate)

    def _differentiated(self, value_and_grad: Any, batch: Batch) -> tuple[mx.array, Any]:
        try:
            return value_and_grad(targets(batch))
        except ValueError as error:
            if "VJP" not in str(error):
                raise
            name = type(self.model).__module__.rpartition(".")[2]
            raise UnsupportedError(
                f"mlx-lm's {name} model cannot be differentiated, so nothing trains on it ({error})"
            ) from None

    def _scale_update(self, before: dict[str, mx.array]) -> None:
        """A step is proportional to its rate: a multiple of the step is that of a multiple of the rate."""
        moved = [
            (name, before[name] + self.rates[last] * (array - before[name]))
            for name, array in tree_flatten(self.model.trainable_parameters())
            if (last := name.rpartition(".")[2]) in self.rates
        ]
        self.model.update(tree_unflatten(moved), strict=False)

    def _loss(self, batch: Any) -> mx.array:
        return loss_sum(self.model, batch, head=self._head)


def _digest(examples: Sequence[Example]) -> str:
    """The examples in a few letters, so that a run does not resume on other data."""
    text = ";".join(f"{example.start}:{example.ids}" for example in examples)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
