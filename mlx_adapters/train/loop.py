"""The training loop: it yields one `Step` after each update; the caller logs, saves and stops."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters import device
from mlx_adapters.adapter.call import before_text
from mlx_adapters.cpu import threads
from mlx_adapters.data.batches import MULTIPLE, Batch, batch, batches, rows_at_once
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import TrainingError
from mlx_adapters.models.limits import check_ids, check_length, positions
from mlx_adapters.train import checkpoint
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.distributed import Processes
from mlx_adapters.train.gradient import Gradient, compiling
from mlx_adapters.train.length import epoch_groups, total_steps, warmup_steps
from mlx_adapters.train.loss import Head, Targets, loss_sum, split_head, targets
from mlx_adapters.train.noise import add_noise
from mlx_adapters.train.optimizers import kinds_of, learning_rate, make_optimizer
from mlx_adapters.train.packing import Packing
from mlx_adapters.train.recompute import recompute_blocks
from mlx_adapters.train.shared_prefix import can_share
from mlx_adapters.train.update import Update

__all__ = ["CHECKPOINTS", "Progress", "Run", "Step", "validate"]

# Settings that a resumed run must share: they decide the order of the data or the course of the rates.
_FIXED = (
    *("epochs", "steps", "accumulation", "packing", "seed"),
    *("optimizer", "optimizer_args", "lr", "rates", "warmup", "schedule", "weight_decay", "no_decay"),
    *("clip", "on_bad_step", "spike", "neftune"),
)
CHECKPOINTS = "checkpoints"  # below a run's folder
_RECENT = 20  # steps whose mean a spike is measured against
_PATIENCE = 10  # bad steps one after the other that end a run in any case


@dataclass(frozen=True)
class Step:
    """One optimizer step. `loss` is the mean over its supervised tokens; `tokens` counts what is not
    padding, `tokens_per_second` from them; `memory` is the peak so far in bytes. A `skipped` step had a bad
    loss and changed nothing. After a `last` one nothing comes, for a reason if it is not the end."""

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


def validate(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    processes: Processes | None = None,
    multiple: int = MULTIPLE,
) -> float:
    """Mean loss per supervised token over all `examples`, without dropout."""
    processes = processes or Processes()
    was_training = model.training
    model.eval()
    head = split_head(model)
    total, count = 0.0, 0
    share = (processes.rank, processes.size)
    batch_size *= processes.size
    options: dict[str, Any] = {"pad_id": pad_id, "shuffle": False, "multiple": multiple, "share": share}
    for given in batches(examples, batch_size=batch_size, **options):
        value = loss_sum(model, targets(given), head=head, gradient=False)
        total += float(processes.sums([value], {})[0][0])
        count += given.targets
    model.train(was_training)
    return total / max(1, count)


class Run:
    """A training run over an attached adapter.

    `model` has frozen base weights; what `trainable_parameters()` returns is trained. With a `folder`,
    checkpoints go to `folder/checkpoints` every `config.save_every` steps, and `save()` writes one now.
    `identity` is what else a resumed run must share: the method and its fields, say. `rates` are factors on
    the learning rate of the trained arrays whose last name is the key. `processes` share every batch: each
    computes `config.batch_size` rows of it.
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
        processes: Processes | None = None,
    ) -> None:
        self.model, self.examples, self.validation = model, examples, validation
        self.config, self.pad_id, self.identity = config, pad_id, identity or {}
        self.folder = folder / CHECKPOINTS if folder else None
        rows = [example.ids for example in (*examples, *validation)]
        check_ids(model, [*rows, [pad_id]])
        longest = max(map(len, rows), default=0) + before_text(model)
        check_length(model, longest, advice="cut it (--cutoff)")
        limit = positions(model)  # padding may not go past it either
        self._multiple = 1 if limit is not None and longest + MULTIPLE > limit else MULTIPLE
        self.processes = processes or Processes()
        self.total = total_steps(examples, config, self.processes.size)
        self.warmup = warmup_steps(config, self.total)
        model.eval()
        self._packing = Packing(model) if config.packing else None
        if config.neftune:
            add_noise(model, config.neftune)
        if config.gradient_checkpointing:
            recompute_blocks(model)
        trained, kinds = model.trainable_parameters(), kinds_of(model)
        self.optimizer = make_optimizer(config, self.total, trained, rates, kinds)
        self.step = 0
        self.progress = Progress()
        self._rate = learning_rate(config, self.total)
        self._apply = Update(model, self.optimizer, clip=config.clip, compiled=self.compiles)
        self._head: Head | None = None
        self._start = checkpoint.digest(model)
        self._gradient = Gradient(model, packing=self._packing)
        self._stop = self._stopping = False

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes it."""
        fixed = {name: value for name, value in asdict(self.config).items() if name in _FIXED}
        if self.config.packing:
            fixed["cutoff"] = self.config.cutoff
        rows = self.config.batch_size * self.processes.size
        data = {"examples": len(self.examples), "data": _digest(self.examples)}
        return fixed | {"rows per batch, of all processes together": rows} | data | self.identity

    @property
    def compiles(self) -> bool:
        """Whether the steps are compiled: as the settings say, else on a GPU."""
        return self.config.compile == "on" or (self.config.compile == "auto" and not device.on_cpu())

    def save(self) -> Path | None:
        """Write a checkpoint of the last finished step; None without a folder."""
        return self._save()

    def use_best(self) -> int:
        """Take the arrays of the best validation; returns its step. Without one nothing changes."""
        if self.folder is None or self.progress.best_loss is None:
            return self.step
        checkpoint.load_adapter(self.folder, self.model, step=self.progress.best_step)
        return self.progress.best_step

    @property
    def moved(self) -> bool:
        """Whether what trains is other than at the run's beginning."""
        return checkpoint.digest(self.model) != self._start

    def stop(self) -> None:
        """End after the current step, in every process."""
        self._stop = True

    def can_resume(self) -> bool:
        """Whether there is something to resume from, for the first process: all of them must ask."""
        found = self.folder is not None and checkpoint.latest(self.folder) is not None
        return bool(self.processes.from_first(mx.array([float(found)])).item())

    def resume(self, warn: Callable[[str], None] = lambda message: None) -> int:
        """Go on from the newest checkpoint; returns its step. Raises TrainingError when there is none."""
        if self.folder is None:
            raise TrainingError("a run without a folder has nothing to resume from")
        if self.processes.writes:  # the other machines may not have the folder
            self.step, progress = checkpoint.restore(
                self.folder, self.model, self.optimizer, settings=self.settings, warn=warn
            )
            self.progress = Progress(**progress)
        self._share()
        return self.step

    def __iter__(self) -> Iterator[Step]:
        """Train to the end, yielding after every step. Raises TrainingError when the loss is not a number."""
        return self.steps()

    def steps(self, record: Callable[[Step], None] = lambda step: None) -> Iterator[Step]:
        """Like iterating. `record` gets each step before its checkpoint is written: a run that is killed in
        between takes the step again, so that what `record` keeps never lacks one."""
        self.processes.agree(repr(self.settings), "settings or data")
        self.progress.threads = threads.keep_up(self.progress.threads)
        self._share()  # the adapter's random start too
        self.model.eval()  # with dropout on, the probe would find no head that agrees
        self._head = split_head(self.model)
        shares = not self.config.neftune and not self.config.packing and can_share(self.model)
        self._gradient = Gradient(self.model, packing=self._packing, compiled=self.compiles, shares=shares)
        self.model.train()
        device.prepare_memory()
        for epoch, window in self._windows():
            if self._out_of_patience:
                break
            self.progress.threads = threads.keep_up(self.progress.threads)
            step = self._step(epoch, window)
            record(step)
            if self.step == self.total or self._out_of_patience or self.step % self.config.save_every == 0:
                self._save()
            yield step
        self.model.eval()

    def _step(self, epoch: float, window: list[Batch]) -> Step:
        started = time.perf_counter()
        with compiling():
            loss, norm, rate, good = self._update(window)
        self.step += 1
        seconds = time.perf_counter() - started
        tokens = sum(batch.tokens for batch in window)
        last = self.step == self.total
        validation = None
        if self.validation and (last or self.step % self.config.validate_every == 0):
            validation = self._measure()
        reason = None
        if not last and self._out_of_patience:
            reason = f"no better validation than step {self.progress.best_step}'s"
        elif not last and (self._stopping or (self._stop and self.processes.size == 1)):
            reason = "interrupted"
        return Step(
            step=self.step,
            total=self.total,
            epoch=epoch,
            loss=loss,
            lr=rate,
            grad_norm=norm,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            memory=device.peak_memory(),
            validation_loss=validation,
            skipped=not good,
            stopped=reason,
        )

    def _measure(self) -> float:
        loss = validate(
            self.model,
            self.validation,
            batch_size=self.config.batch_size,
            pad_id=self.pad_id,
            processes=self.processes,
            multiple=self._multiple,
        )
        if self.progress.measured(self.step, loss):
            self._save(best=True)
        return loss

    @property
    def _out_of_patience(self) -> bool:
        return self.config.patience is not None and self.progress.worse >= self.config.patience

    def _save(self, *, best: bool = False) -> Path | None:
        if self.folder is None or not self.processes.writes:
            return None
        return checkpoint.save(
            self.folder,
            self.model,
            self.optimizer,
            step=self.step,
            settings=self.settings,
            progress=asdict(self.progress),
            keep=self.config.keep,
            best=best,
        )

    def _share(self) -> None:
        """The state of the first process becomes everyone's."""
        if self.processes.size == 1:
            return
        state = {"adapter": self.model.trainable_parameters(), "optimizer": self.optimizer.state}
        own, best = self.progress, self.progress.best_loss
        recent = own.recent[-_RECENT:]
        numbers = [self.step, best is not None, best or 0.0, own.best_step, own.worse, own.bad, own.threads]
        numbers += [len(recent), *recent, *[0.0] * (_RECENT - len(recent))]
        shared = self.processes.from_first(state | {"numbers": mx.array(numbers, dtype=mx.float32)})
        self.model.update(shared["adapter"])
        self.optimizer.state = shared["optimizer"]
        step, known, best, *rest = shared["numbers"].tolist()  # float32 everywhere: all must decide alike
        self.step, best_step, worse, bad, count, length = map(int, [step, *rest[:5]])
        self.progress = Progress(best if known else None, best_step, worse, rest[5 : 5 + length], bad, count)

    def _windows(self) -> Iterator[tuple[float, list[Batch]]]:
        """(epoch reached, the batches of one step), from the current step on."""
        position, epoch, size = 0, 0, self.config.accumulation
        options: dict[str, Any] = {"pad_id": self.pad_id, "multiple": self._multiple}
        options |= {"packed": self.config.packing, "share": (self.processes.rank, self.processes.size)}
        while position < self.total:
            order = self._order(epoch)
            for first in range(0, len(order), size):
                position += 1
                if position > self.total:
                    return
                if position <= self.step:
                    continue
                window = [
                    batch(self.examples, part, **options)
                    for group in order[first : first + size]
                    for part in self._parts(group)
                ]
                yield epoch + min(1.0, (first + size) / len(order)), window
            epoch += 1

    def _order(self, epoch: int) -> list[list[list[int]]]:
        return epoch_groups(self.examples, self.config, self.processes.size, epoch)

    def _parts(self, group: list[list[int]]) -> list[list[list[int]]]:
        """On a CPU a batch is computed a few rows at a time: the sums are the same, and the activations of
        fewer rows take less memory and stay nearer. A GPU wants all rows together."""
        if not device.on_cpu():
            return [group]
        longest = max(sum(len(self.examples[i].ids) for i in row) for row in group)
        rows = rows_at_once(len(group), longest, self.processes.size)
        return [group[first : first + rows] for first in range(0, len(group), rows)]

    def _update(self, window: list[Batch]) -> tuple[float, float, float, bool]:
        """(loss, norm of the gradient, rate, whether the step was taken); the device is asked once."""
        # The noise of dropout follows from (seed, step): resuming repeats it, validation cannot shift it.
        mx.random.seed(self.config.seed * 1_000_003 + self.step + self.processes.rank * 15_485_863)
        count = max(1, sum(batch.targets for batch in window))
        loss, grads = self._gradient(self._loss, window)
        mx.async_eval(loss, grads)  # apart from the update: its order of evaluation needs more memory
        (loss, stops), grads = self.processes.sums([loss, mx.array(float(self._stop))], grads)
        mean, norm, good = self._apply(grads, loss, count, self._most())
        rate = self._rate(mx.array(self.step))
        mx.eval(self.model.trainable_parameters(), self.optimizer.state, mean, norm, good, rate, stops)
        if self.processes.size > 1:  # a signal reaches them at different steps: all have to have heard of it
            self._stopping = float(stops) > 0
        self._judge(float(mean), float(norm), bool(good))
        return float(mean), float(norm), float(rate), bool(good)

    def _most(self) -> float:
        """The largest loss that is no spike."""
        recent = self.progress.recent
        if not self.config.spike or len(recent) < _RECENT:
            return math.inf
        return self.config.spike * sum(recent) / len(recent)

    def _judge(self, loss: float, norm: float, good: bool) -> None:
        """Note the outcome of a step; TrainingError where it has to end the run."""
        if good:
            self.progress.recent = [*self.progress.recent, loss][-_RECENT:]
            self.progress.bad = 0
            return
        self.progress.bad += 1
        if self.config.on_bad_step == "skip" and self.progress.bad < _PATIENCE:
            return
        often = f" ({self.progress.bad} bad steps in a row)" if self.progress.bad > 1 else ""
        raise TrainingError(
            f"step {self.step + 1}: the loss is {loss}, its gradient's norm {norm}{often}. The checkpoint "
            "before is kept: lower --lr, look for odd rows in the data, or go on with --on-bad-step skip"
        )

    def _loss(self, given: Targets, cache: list[Any] | None) -> mx.array:
        if self._packing:
            cache = self._packing.caches()
        return loss_sum(self.model, given, head=self._head, cache=cache)


def _digest(examples: Sequence[Example]) -> str:
    """The examples in a few letters, so that a run does not resume on other data."""
    text = ";".join(f"{example.start}:{example.ids}" for example in examples)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
