"""The training loop: it yields one `Step` after each update; the caller logs, saves and stops."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_adapters import device
from mlx_adapters.adapter.call import before_text
from mlx_adapters.cpu import threads
from mlx_adapters.data.batches import MULTIPLE, Batch, make_batch, rows_per_pass
from mlx_adapters.data.mixture import Weighted
from mlx_adapters.data.picked import id_rows, lengths_of
from mlx_adapters.data.token_cache import StoredExamples
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import TrainingError
from mlx_adapters.models.limits import check_ids, check_length, positions
from mlx_adapters.train import checkpoint
from mlx_adapters.train import compile as compilation
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.distributed import Processes
from mlx_adapters.train.length import epoch_groups, in_parts, total_steps, warmup_steps
from mlx_adapters.train.loss import Head, split_head
from mlx_adapters.train.noise import add_noise
from mlx_adapters.train.optimizers import kinds_of, learning_rate, make_optimizer
from mlx_adapters.train.packing import packing
from mlx_adapters.train.progress import INTERRUPTED, RECENT, Measured, Progress, Sample, Step
from mlx_adapters.train.recompute import Recompute
from mlx_adapters.train.router_loss import refuse_without_routers
from mlx_adapters.train.shared_prefix import can_share, share_prefix
from mlx_adapters.train.step import (
    GradientFn,
    StepGradientFn,
    UpdateFn,
    accumulate,
    make_update,
    train_step,
    value_and_grad,
)
from mlx_adapters.train.validation import validate
from mlx_adapters.train.watching import Watch

__all__ = ["CHECKPOINTS", "Run"]

# Settings that a resumed run must share: they decide the order of the data or the course of the rates.
_FIXED = (
    *("epochs", "steps", "accumulation", "packing", "seed"),
    *("optimizer", "optimizer_args", "lr", "rates", "warmup", "schedule", "weight_decay", "no_decay"),
    *("clip", "on_bad_step", "spike", "neftune"),
)
CHECKPOINTS = "checkpoints"  # below a run's folder


class Run:
    """A training run over an attached adapter.

    `model` has frozen base weights; what `trainable_parameters()` returns is trained. With a `folder`,
    checkpoints go to `folder/checkpoints` every `config.save_every` steps, and `save()` writes one now.
    `identity` is what else a resumed run must share, such as the method and its fields. `rates` are learning
    rate multipliers, by the last name of the trained arrays. `processes` share every batch: each computes
    `config.batch_size` rows of it. `watch` is what is measured beside the loss on the `validation` rows.
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
        watch: Watch | None = None,
    ) -> None:
        self.watch = watch
        self.model, self.examples, self.validation = model, examples, validation
        self.config, self.pad_id, self.identity = config, pad_id, identity or {}
        self.folder = folder / CHECKPOINTS if folder else None
        check_ids(model, chain(id_rows(examples), id_rows(validation), [[pad_id]]))
        self._lengths = lengths_of(examples)
        lengths = np.concatenate([self._lengths, lengths_of(validation)])
        longest = int(lengths.max(initial=0)) + before_text(model)
        check_length(model, longest, advice="cut it (--max-length)")
        limit = positions(model)  # padding may not go past it either
        self._multiple = 1 if limit is not None and longest + MULTIPLE > limit else MULTIPLE
        self.processes = processes or Processes()
        self.total = total_steps(examples, config, self.processes.size)
        self.warmup = warmup_steps(config, self.total)
        if config.router_aux_loss:
            refuse_without_routers(model)
        model.eval()
        self._wrappers: list[Callable[[GradientFn], GradientFn]] = []
        if config.packing:
            self._wrappers.append(packing(model))
        if config.neftune:
            add_noise(model, config.neftune)
        if config.gradient_checkpointing:
            self._wrappers.append(Recompute(model))
        trained, kinds = model.trainable_parameters(), kinds_of(model)
        self.optimizer = make_optimizer(config, self.total, trained, rates, kinds)
        self.step = 0
        self.progress = Progress()
        self._rate = learning_rate(config, self.total)
        self._start = checkpoint.digest(model)
        self.stopping = False
        if watch and self.processes.size == 1:  # several have to stop together, after a step
            watch.stopped = lambda: self.stopping
        self.checkpoint: Path | None = None  # that of the last step, where one was written

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes it."""
        fixed = {name: value for name, value in asdict(self.config).items() if name in _FIXED}
        if self.config.max_length:  # packing fills rows up to it; of other runs, how the rows were cut
            fixed["max_length"] = self.config.max_length
        if self.config.router_aux_loss:
            fixed["router_aux_loss"] = self.config.router_aux_loss
        if isinstance(self.examples, Weighted):
            fixed["mixture"] = self.examples.described
        rows = self.config.batch_size * self.processes.size
        data = {"examples": len(self.examples), "data": self._data}
        return fixed | {"rows per batch, of all processes together": rows} | data | self.identity

    @cached_property
    def _data(self) -> str:
        return _digest(self.examples)

    @property
    def compiles(self) -> bool:
        """Whether the steps are compiled: as the settings say, else on a GPU."""
        return self.config.compile == "on" or (self.config.compile == "auto" and not device.on_cpu())

    def save(self) -> Path | None:
        """Write a checkpoint of the last finished step; None without a folder."""
        return self._save()

    def use_best(self) -> int:
        """Take the arrays of the best validation; returns its step. Without one nothing changes."""
        if self.folder is None or not self.progress.best_step:
            return self.step
        checkpoint.load_adapter(self.folder, self.model, step=self.progress.best_step)
        return self.progress.best_step

    @property
    def moved(self) -> bool:
        """Whether what trains is other than at the run's beginning."""
        return checkpoint.digest(self.model) != self._start

    def stop(self) -> None:
        """End after the current step, in every process."""
        self.stopping = True

    def can_resume(self) -> bool:
        """Whether there is something to resume from, for the first process: all of them must ask."""
        found = self.folder is not None and checkpoint.latest(self.folder) is not None
        return bool(self.processes.from_first(mx.array([float(found)])).item())

    def resume(self, warn: Callable[[str], None] = lambda message: None) -> int:
        """Continue from the newest checkpoint; returns its step. Raises TrainingError when there is none."""
        if self.folder is None:
            raise TrainingError("a run without a folder has nothing to resume from")
        if self.processes.writes:  # the other machines may not have the folder
            self.step, progress = checkpoint.restore(
                self.folder, self.model, self.optimizer, settings=self.settings, warn=warn
            )
            self.progress = Progress(**progress)
            if self.step > self.total:
                raise TrainingError(f"{self.folder}: has {self.step} steps already: give more --steps")
        self._share()
        return self.step

    def __iter__(self) -> Iterator[Step]:
        """Train to the end, yielding after every step. Raises TrainingError when the loss is not a number."""
        return self.steps()

    def steps(self, record: Callable[[Measured], None] = lambda step: None) -> Iterator[Step]:
        """Like iterating. `record` gets each step before its checkpoint is written: a run that is killed in
        between takes the step again, so that what `record` keeps never lacks one. What is measured before
        the first step, to compare with, goes to `record` alone, and is never the best."""
        self.processes.agree(repr(self.settings), "settings or data")
        self.progress.threads = threads.keep_up(self.progress.threads)
        self._share()  # the adapter's random start too
        self.model.eval()  # with dropout on, the probe would find no head that agrees
        plain = not (self.config.neftune or self.config.packing or self.config.router_aux_loss)
        share = plain and can_share(self.model)
        gradient = self.gradient_fn(split_head(self.model), share=share)
        update = make_update(self.optimizer, self.config.clip, compiled=self.compiles)
        self.model.train()
        device.prepare_memory()
        try:
            if self.step == 0 or self.progress.unmeasured:
                self._measure_first(record)
            self._tell("compiling" if self.compiles else "")
            for epoch, step_batches in self.step_batches():
                if self._out_of_patience:
                    break
                self.progress.threads = threads.keep_up(self.progress.threads)
                self.checkpoint = None
                step = self._step(epoch, step_batches, gradient, update)
                record(step)
                last = self.step == self.total or self._out_of_patience
                if last or self.step % self.config.save_every == 0:
                    self._save()
                yield step
        finally:
            self.model.eval()

    def gradient_fn(self, head: Head | None, *, share: bool) -> StepGradientFn:
        """The gradient of a step: the plain one, wrapped in what makes it cheaper."""
        gradient = value_and_grad(self.model, head, router_aux_loss=self.config.router_aux_loss)
        for wrap in self._wrappers:
            gradient = wrap(gradient)
        if self.compiles:
            compilation.prepare(self.model)
            gradient = compilation.Compiled(gradient)
        step_gradient = accumulate(gradient)
        if not share:
            return step_gradient
        return share_prefix(step_gradient, self.model, head, compiled=self.compiles)

    def _step(self, epoch: float, batches: list[Batch], gradient: StepGradientFn, update: UpdateFn) -> Step:
        started = time.perf_counter()
        # The noise of dropout follows from (seed, step): resuming repeats it, validation cannot shift it.
        mx.random.seed(self.config.seed * 1_000_003 + self.step + self.processes.rank * 15_485_863)
        rate = self._rate(mx.array(self.step))
        mx.async_eval(rate)
        with compilation.compiling():
            done = train_step(
                self.model,
                self.optimizer,
                gradient,
                update,
                batches,
                max_loss=self.progress.max_loss(self.config),
                processes=self.processes,
                stop=self.stopping,
            )
        self.progress.judge(self.step + 1, done, self.config)
        self.step += 1
        seconds = time.perf_counter() - started
        tokens = sum(batch.tokens for batch in batches)
        last = self.step == self.total
        measured = self._measure()
        reason = None
        if not last and self._out_of_patience:
            what = "accuracy" if self.config.judged_by == "accuracy" else "validation"
            reason = f"no better {what} than step {self.progress.best_step}'s"
        elif self.progress.unmeasured:
            reason = INTERRUPTED
        elif not last and (done.stopped if self.processes.size > 1 else self.stopping):
            reason = (
                INTERRUPTED  # a signal reaches processes at different steps: all have to have heard of it
            )
        return Step(
            **vars(measured),
            total=self.total,
            epoch=epoch,
            loss=done.loss,
            lr=float(rate),
            grad_norm=done.grad_norm,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            memory=device.peak_memory(),
            skipped=not done.good,
            stopped=reason,
        )

    def _measure_first(self, record: Callable[[Measured], None]) -> None:
        """What a run without steps measures, and one that had to end while it measured its last step."""
        found = self._measure()
        if found.anything:
            record(found)
        if self.step:
            self._save()

    def _measure(self) -> Measured:
        """What is to be measured at this step: the validation loss, right answers, samples."""
        config, watch, last = self.config, self.watch, self.step == self.total
        due = last or self.step % config.validate_every == 0
        ask = last or self.step % (config.eval_every or config.validate_every) == 0
        loss, samples = None, tuple[Sample, ...]()
        if due and self.validation:
            self._tell("validation")
            loss = validate(
                self.model,
                self.validation,
                batch_size=config.batch_size,
                pad_id=self.pad_id,
                processes=self.processes,
                multiple=self._multiple,
            )
        shares = watch.accuracies() if watch and ask else {}
        self.progress.unmeasured = shares is None and self.step > 0
        if watch and due and shares is not None:
            samples = watch.samples()
        mean = sum(shares.values()) / len(shares) if shares else None
        named: dict[str, Any] = {"accuracy": mean, "accuracies": shares or None, "samples": samples}
        found = Measured(step=self.step, validation_loss=loss, **named)
        if self.step and not self.progress.unmeasured and self.progress.measured(found, config.judged_by):
            self._save(best=True)
        return found

    def _tell(self, doing: str) -> None:
        """What takes time now, for the bar."""
        if self.watch:
            self.watch.tell(doing)

    @property
    def _out_of_patience(self) -> bool:
        return self.config.patience is not None and self.progress.worse >= self.config.patience

    def _save(self, *, best: bool = False) -> Path | None:
        if self.folder is None or not self.processes.writes:
            return None
        self.checkpoint = checkpoint.save(
            self.folder,
            self.model,
            self.optimizer,
            step=self.step,
            settings=self.settings,
            progress=asdict(self.progress),
            keep=self.config.keep,
            best=best,
        )
        return self.checkpoint

    def _share(self) -> None:
        """The state of the first process becomes everyone's."""
        if self.processes.size == 1:
            return
        state = {"adapter": self.model.trainable_parameters(), "optimizer": self.optimizer.state}
        own, best, right = self.progress, self.progress.best_loss, self.progress.best_accuracy
        recent = own.recent[-RECENT:]
        numbers = [own.unmeasured, right is not None, right or 0.0, self.step, best is not None, best or 0.0]
        numbers += [own.best_step, own.worse, own.bad, own.threads]
        numbers += [len(recent), *recent, *[0.0] * (RECENT - len(recent))]
        shared = self.processes.from_first(state | {"numbers": mx.array(numbers, dtype=mx.float32)})
        self.model.update(shared["adapter"])
        self.optimizer.state = shared["optimizer"]
        unmeasured, asked, right, step, known, best, *rest = shared["numbers"].tolist()
        # float32 everywhere: all must decide alike
        self.step, best_step, worse, bad, count, length = map(int, [step, *rest[:5]])
        self.progress = Progress(best if known else None, best_step, worse, rest[5 : 5 + length], bad, count)
        self.progress.best_accuracy, self.progress.unmeasured = right if asked else None, bool(unmeasured)

    def step_batches(self) -> Iterator[tuple[float, list[Batch]]]:
        """(epoch reached, the batches of one step), from the current step on."""
        position, epoch, size = 0, 0, self.config.accumulation
        options: dict[str, Any] = {"pad_id": self.pad_id, "multiple": self._multiple}
        options |= {"whole": bool(self.config.router_aux_loss)}
        options |= {"packed": self.config.packing, "share": (self.processes.rank, self.processes.size)}
        while position < self.total:
            order = self._order(epoch)
            for first in range(0, len(order), size):
                position += 1
                if position > self.total:
                    return
                if position <= self.step:
                    continue
                step = [
                    make_batch([[self.examples[i] for i in row] for row in rows], **options)
                    for group in order[first : first + size]
                    for rows in self._passes(group)
                ]
                yield epoch + min(1.0, (first + size) / len(order)), step
            epoch += 1

    def _order(self, epoch: int) -> Sequence[list[list[int]]]:
        return epoch_groups(self.examples, self.config, self.processes.size, epoch)

    def _passes(self, group: list[list[int]]) -> list[list[list[int]]]:
        """On a CPU a batch is computed a few rows at a time: the sums are the same, and the activations of
        fewer rows take less memory and stay nearer. A GPU wants all rows together."""
        if not in_parts(self.config):
            return [group]
        longest = max(int(self._lengths[row].sum()) for row in group)
        rows = rows_per_pass(len(group), longest, self.processes.size)
        return [group[first : first + rows] for first in range(0, len(group), rows)]


def _digest(examples: Sequence[Example]) -> str:
    """The examples in a few letters, so that a run does not resume on other data."""
    if isinstance(examples, StoredExamples):
        return examples.digest
    found = hashlib.sha256()
    for number, example in enumerate(examples):
        found.update(f"{';' if number else ''}{example.as_text()}".encode())
    return found.hexdigest()[:16]
