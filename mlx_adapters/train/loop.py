"""The training loop: batches in, one `Step` out per optimizer step.

What a step does is a function of (seed, step number, arrays): the order of the data comes from (seed, epoch)
and the noise of dropout from (seed, step). So a checkpoint is arrays and a step number, and a resumed run
equals an uninterrupted one bit for bit.

The gradient of a step is that of the mean loss over all supervised tokens in its batches, whatever their
sizes: sums are accumulated and divided once.
"""

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_adapters import backend
from mlx_adapters.data.batches import Batch, batches
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import AdaptersError, DataError, OutputError
from mlx_adapters.train import checkpoint
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.schedule import learning_rate

__all__ = ["Loss", "Step", "Trainer", "train", "validation_loss"]

Loss = Callable[[nn.Module, mx.array, mx.array], tuple[mx.array, mx.array]]
Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class Step:
    """One optimizer step. `loss` is the mean over its supervised tokens.

    `tokens` counts what the step read without padding, prompts included; `tokens_per_second` is that over
    `seconds`, the time of the step without validation and saving. `memory` is the peak so far in bytes.
    """

    step: int
    total: int
    epoch: float
    loss: float
    validation_loss: float | None
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    tokens_per_second: float
    memory: int


def train(
    model: nn.Module,
    examples: Sequence[Example],
    validation: Sequence[Example] = (),
    *,
    config: TrainConfig,
    folder: Path | None = None,
    save: Callable[[Path], None] | None = None,
    resume: bool = False,
    pad_id: int = 0,
    loss: Loss | None = None,
) -> Generator[Step, None, None]:
    """Train `model.trainable_parameters()` and yield every step.

    With `folder`, checkpoints go to `folder/checkpoints`, and `save(folder)` writes the adapter when the run
    ends: also when it is interrupted by Ctrl-C or closed (`steps.close()`), so that it can be resumed.
    `resume` continues from the newest checkpoint, or from the start where there is none.

    Raises AdaptersError when a loss or gradient is not finite; model and checkpoints keep the last good step.
    """
    trainer = Trainer(
        model, examples, validation, config=config, folder=folder, save=save, pad_id=pad_id, loss=loss
    )
    if resume:
        trainer.resume()
    try:
        yield from trainer.steps()
    except (KeyboardInterrupt, GeneratorExit):
        trainer.finish()
        raise
    finally:
        model.eval()
    trainer.finish()


class Trainer:
    """The state of a run: `step` steps are done, with `parameters` and the optimizer's state as they left them."""

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        validation: Sequence[Example] = (),
        *,
        config: TrainConfig,
        folder: Path | None = None,
        save: Callable[[Path], None] | None = None,
        pad_id: int = 0,
        loss: Loss | None = None,
    ) -> None:
        if not examples:
            raise DataError("there are no training examples")
        self.model, self.examples, self.validation = model, examples, validation
        self.config, self.folder, self.save, self.pad_id = config, folder, save, pad_id
        self.loss = loss or _default_loss()
        self.parameters: Arrays = dict(tree_flatten(model.trainable_parameters()))
        if not self.parameters:
            raise AdaptersError("the model has no trainable parameters: attach an adapter first")
        self.optimizer = optim.AdamW(
            learning_rate=config.lr, weight_decay=config.weight_decay, bias_correction=True
        )
        self.optimizer.init(self.parameters)
        self.step = 0
        self.saved = -1
        per_epoch = math.ceil(len(examples) / config.batch_size)
        self.steps_per_epoch = math.ceil(per_epoch / config.accumulation)
        self.total = config.steps or config.epochs * self.steps_per_epoch
        self._gradient = nn.value_and_grad(model, self.loss)
        self._epoch: tuple[int, list[Batch]] = (-1, [])

    def steps(self) -> Generator[Step, None, None]:
        """Run from the current step to the last."""
        while self.step < self.total:
            done = self._advance()
            if self._due(self.config.eval_every or self.steps_per_epoch) and self.validation:
                loss = validation_loss(
                    self.model,
                    self.validation,
                    batch_size=self.config.batch_size,
                    pad_id=self.pad_id,
                    loss=self.loss,
                )
                done = Step(**{**done.__dict__, "validation_loss": loss})
            if self.config.save_every and self._due(self.config.save_every):
                self.save_checkpoint()
            yield done

    def resume(self) -> int:
        """Continue from the newest checkpoint of `folder`; returns its step, 0 where there is none."""
        found = checkpoint.newest(self.folder) if self.folder else None
        if found is None:
            return 0
        state = checkpoint.read(found)
        checkpoint.check(state, run=self._run(), arrays=self.parameters, where=found)
        self.step = self.saved = state.step
        self._commit(state.parameters, checkpoint.optimizer_tree(state))
        mx.eval(self.parameters, self.optimizer.state)
        return self.step

    def save_checkpoint(self) -> Path | None:
        """Write a checkpoint of the last finished step, once; None without a folder."""
        if self.folder is None:
            return None
        # after an interrupt within a step the model may hold something else
        self.model.update(tree_unflatten(list(self.parameters.items())))
        if self.saved == self.step:
            return checkpoint.path(self.folder, self.step)
        state = checkpoint.State.of(self.step, self.parameters, self.optimizer.state, self._run())
        written = checkpoint.write(self.folder, state, save=self.save, keep=self.config.keep)
        self.saved = self.step
        return written

    def finish(self) -> None:
        """Checkpoint, and the adapter itself in `folder`."""
        self.save_checkpoint()
        if self.folder is not None and self.save is not None:
            try:
                self.save(self.folder)
            except OSError as error:
                raise OutputError(f"{self.folder}: the adapter cannot be written ({error})") from None

    def _advance(self) -> Step:
        start = time.perf_counter()
        number, config = self.step + 1, self.config
        lr = learning_rate(number, self.total, peak=config.lr, warmup=config.warmup, schedule=config.schedule)
        window = self._window(number)
        self.model.train()
        mx.random.seed((config.seed * 1_000_003 + number) % 2**63)
        total_loss, targets, gradients = self._accumulate(window)
        norm = mx.sqrt(sum((g.astype(mx.float32).square().sum() for g in gradients.values()), mx.array(0.0)))
        if config.clip:
            factor = mx.minimum(config.clip / (norm + 1e-6), 1.0)
            gradients = {name: (g * factor).astype(g.dtype) for name, g in gradients.items()}
        mean = total_loss / mx.maximum(targets, 1)
        mx.eval(mean, norm, gradients)  # the one wait for the device that the log needs anyway
        loss, size = float(mean.item()), float(norm.item())
        if not (math.isfinite(loss) and math.isfinite(size)):
            raise AdaptersError(self._not_finite(number, loss, size, lr))
        self._update(gradients, lr)
        self.step = number
        seconds = time.perf_counter() - start
        tokens = sum(batch.tokens for batch in window)
        return Step(
            step=number,
            total=self.total,
            epoch=number / self.steps_per_epoch,
            loss=loss,
            validation_loss=None,
            lr=lr,
            grad_norm=size,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            memory=backend.peak_memory(),
        )

    def _accumulate(self, window: list[Batch]) -> tuple[mx.array, mx.array, Arrays]:
        """Loss summed over the window's supervised tokens, their number, and the gradient of the mean."""
        total, targets, gradients = mx.array(0.0), mx.array(0.0), {}
        for batch in window:
            (loss, tokens), tree = self._gradient(self.model, mx.array(batch.ids), mx.array(batch.mask))
            flat = dict(tree_flatten(tree))
            gradients = {name: gradients[name] + g for name, g in flat.items()} if gradients else flat
            total, targets = total + loss, targets + tokens
            if len(window) > 1:
                mx.eval(total, targets, gradients)  # else the graphs of all batches are in memory at once
        divisor = mx.maximum(targets, 1)
        return total, targets, {name: g / divisor for name, g in gradients.items()}

    def _update(self, gradients: Arrays, lr: float) -> None:
        self.optimizer.learning_rate = lr
        parameters = self.optimizer.apply_gradients(gradients, self.parameters)
        mx.eval(parameters, self.optimizer.state)
        self._commit(parameters, None)

    def _commit(self, parameters: Arrays, optimizer_state: Any) -> None:
        self.parameters = dict(parameters)
        if optimizer_state is not None:
            self.optimizer.state = optimizer_state
            self.optimizer.init(self.parameters)
        self.model.update(tree_unflatten(list(self.parameters.items())))

    def _window(self, number: int) -> list[Batch]:
        """The batches of a step. Windows do not cross epochs: the last of an epoch may be smaller."""
        epoch, index = divmod(number - 1, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            made = batches(
                self.examples,
                batch_size=self.config.batch_size,
                pad_id=self.pad_id,
                seed=self.config.seed,
                epoch=epoch,
            )
            self._epoch = (epoch, made)
        size = self.config.accumulation
        return self._epoch[1][index * size : (index + 1) * size]

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total

    def _run(self) -> dict[str, Any]:
        return checkpoint.identity(self.config, self.examples)

    def _not_finite(self, number: int, loss: float, norm: float, lr: float) -> str:
        last = checkpoint.newest(self.folder) if self.folder else None
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
        return (
            f"step {number}: the loss ({loss:g}) or the norm of its gradient ({norm:g}) is not finite at "
            f"learning rate {lr:.3g}; {kept}. Lower lr, or look for broken rows in the data"
        )


def validation_loss(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int = 0,
    loss: Loss | None = None,
) -> float:
    """Mean loss over the supervised tokens of all examples, dropout off."""
    loss = loss or _default_loss()
    training = model.training
    model.eval()
    total = targets = 0.0
    for batch in batches(examples, batch_size=batch_size, pad_id=pad_id, shuffle=False):
        value, _ = loss(model, mx.array(batch.ids), mx.array(batch.mask))
        total += float(value.item())
        targets += batch.targets
    model.train(training)
    return total / max(targets, 1.0)


def _default_loss() -> Loss:
    from mlx_adapters.train.loss import loss

    return loss
