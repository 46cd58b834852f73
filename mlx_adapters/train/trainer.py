"""Train an adapter: `train` runs to the end, a `Trainer` yields every step.

result = train(load("model"), "data.jsonl", "lora", output="adapter", epochs=3)

for step in Trainer(load("model"), "data.jsonl", "lora", output="adapter", epochs=3):
    print(step.loss)
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_adapters import adapter, methods
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.data.sources import Rows
from mlx_adapters.data.token_cache import Facts
from mlx_adapters.errors import OutputError, TrainingError, counted, writing_to
from mlx_adapters.fields import parse_fields
from mlx_adapters.files.lock import locked
from mlx_adapters.methods.base import Method
from mlx_adapters.models.load import LanguageModel, describe, fingerprint
from mlx_adapters.train import classes, metrics
from mlx_adapters.train.callbacks import Callback, callbacks_of, continues, tell_tokens
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.distributed import Processes
from mlx_adapters.train.examples import Data, excluded_hashes, pad_id, prepare, rows_of, select
from mlx_adapters.train.interrupt import stop_on_interrupt
from mlx_adapters.train.length import epochs
from mlx_adapters.train.loggers import open_loggers
from mlx_adapters.train.loop import CHECKPOINTS, Run
from mlx_adapters.train.max_length import fitted, settled
from mlx_adapters.train.progress import INTERRUPTED, Measured, Step
from mlx_adapters.train.result import PLOT, TrainResult, result_of
from mlx_adapters.train.shown import shown
from mlx_adapters.train.validation import parts_of
from mlx_adapters.train.watching import test_items, watch
from mlx_adapters.train.wording import written_with
from mlx_adapters.train.written import written_time

__all__ = ["TrainResult", "Trainer", "check_output", "train"]

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
_CALLBACK = "a callback ended it"
_SAVED = (INTERRUPTED, _CALLBACK)  # why a run ends that is saved as it is then, to be resumed


def train(
    model: LanguageModel,
    data: Data,
    method: Method | str = "lora",
    *,
    output: str | Path,
    callbacks: Sequence[Callback | Callable[[Step], bool | None]] = (),
    progress: bool | None = None,
    **options: Any,
) -> TrainResult:
    """Train an adapter to the end, and save it.

    Afterwards `model` is bare again. Ctrl-C ends the run after the current step, which is saved, and raises
    KeyboardInterrupt; `resume=True` continues it.

    Args:
        model: a loaded model; its weights do not change.
        data: a `.json` or `.jsonl` file, a folder, a hub id, several of them, or a list of rows.
        method: the method with its options, as `LoRA(rank=16)`, or its name.
        output: the new folder for the adapter, its losses and checkpoints.
        callbacks: functions that are called with every `Step`, or objects of `Callback`.
        progress: show how it goes; by default in a notebook and on a terminal.
        **options: the other arguments of `Trainer`, and the fields of `TrainConfig`: `epochs=3, lr=2e-4`.

    Returns:
        The losses, the number of steps, the folder: see `TrainResult`.

    Raises:
        ConfigError, DataError, OutputError, UnsupportedError: before anything is trained.
        TrainingError: where the loss is not a number, or the run has changed nothing.
    """
    trainer = Trainer(model, data, method, output=output, callbacks=callbacks, **options)
    try:
        with stop_on_interrupt(trainer.stop) as interrupted, shown(trainer.run.total, progress) as show:
            for step in trainer:
                show(step)
    finally:
        trainer.detach()
    if interrupted:
        raise KeyboardInterrupt(f"stopped at step {trainer.run.step}: saved in {output}")
    return trainer.result


class Trainer:
    """A run that is ready to begin. Iterate to train, a step at a time; at the end the adapter is saved.

    What stopped early is in the `stopped` of the last step, the rest in `result`. After a `break` nothing is
    saved but the checkpoints so far: call `save`. The adapter stays on the model: `detach` takes it off.

    Args:
        model: a loaded model; its weights do not change.
        data: a `.json` or `.jsonl` file, a folder, a hub id, several of them, or a list of rows.
        method: the method with its options, as `LoRA(rank=16)`, or its name.
        output: the new folder for the adapter, its losses and checkpoints.
        callbacks: functions that are called with every `Step`, or objects of `Callback`.
        start: an adapter's folder or hub id to continue from, ours or PEFT's: its method and settings count.
        resume: continue the run in `output` from its newest checkpoint.
        exclude: test files whose questions must not be trained on, or their hashes.
        log: also to tensorboard, wandb or trackio.
        processes: the processes that share every batch. The first one writes.
        **options: the fields of `TrainConfig`.

    Attributes:
        run: the loop over the encoded examples.
        config: the settings of the run.
        paths: the layers that the adapter is on.
        encoded: the examples, and what is odd about the rows.
        excluded: how many rows were left out because of `exclude`.
        trainable: how many parameters the adapter has.
        parameters: how many the model has with it.
        notes: what a user may want to know, as sentences.
        measured_on: the validation rows in words; None where there are none.
        watch: what else is measured while training.

    Raises:
        ConfigError, DataError, OutputError, UnsupportedError: the model is then as it was.
    """

    def __init__(
        self,
        model: LanguageModel,
        data: Data,
        method: Method | str = "lora",
        *,
        output: str | Path,
        callbacks: Sequence[Callback | Callable[[Step], bool | None]] = (),
        start: str | Path | None = None,
        resume: bool = False,
        exclude: Sequence[str | Path] | frozenset[str] = (),
        log: Sequence[str] = (),
        processes: Processes | None = None,
        **options: Any,
    ) -> None:
        self.model, self.output = model, Path(output)
        self.config: TrainConfig = parse_fields(TrainConfig, options, where="train")
        self.processes = processes or Processes()
        self.callbacks = callbacks_of(callbacks)
        self._result: TrainResult | None = None
        self._lock, self._holds_lock = ExitStack(), False
        self._restore_classes, self._attached = classes.remember(model.model), False
        if self.processes.writes:
            check_output(self.output, resume)
        try:
            if resume:
                self._hold_lock()  # or it would continue from what another run is writing
            self._sets = test_items(self.config)  # a wrong name is told before much is read
            rows = rows_of(data, self.config.columns, self.config.streamed(self.processes.size))
            hashes = exclude if isinstance(exclude, frozenset) else excluded_hashes(exclude)
            rows, self.excluded = select(rows, self.config, hashes)
            self._prepare(rows, method, adapter.located(start) if start else None, resume)
            writes = self.processes.writes
            self._loggers = open_loggers(log, self.output, self.meta.training) if writes else []
        except BaseException:
            self._lock.close()
            self.detach()
            raise

    def __iter__(self) -> Iterator[Step]:
        started, stopped = time.perf_counter(), None
        with self._lock:
            self._hold_lock()
            try:
                for step in self.run.steps(self._log):
                    step = self._told(step)
                    stopped = step.stopped
                    if stopped in _SAVED:
                        self.save()
                    yield step
                    if stopped:
                        break
            finally:
                for logger in self._loggers:
                    logger.close()
            self._result = self._finish(time.perf_counter() - started, stopped)
        for callback in self.callbacks:
            callback.on_end(self.result)

    @property
    def result(self) -> TrainResult:
        """What the run came to. Raises TrainingError while it has not ended."""
        if self._result is None:
            raise TrainingError(f"{self.output}: the run has not ended, so it has no result yet")
        return self._result

    def stop(self) -> None:
        """End after the current step, in every process. The run is saved and can be resumed."""
        self.run.stop()

    def save(self) -> None:
        """Save what there is now: the adapter, and a checkpoint to resume from."""
        self.run.save()
        self._save_adapter(self.run.step)

    def detach(self) -> None:
        """Take the adapter off the model, which is bare again."""
        if self._attached:  # what the caller had put on the model is not this run's to take off
            adapter.detach(self.model)
            self._attached = False
        self._restore_classes()

    def _prepare(self, rows: Rows, method: Method | str, start: Path | None, resume: bool) -> None:
        """Encode the rows, attach the adapter, set up the loop."""
        config, processes = self.config, self.processes
        earlier = adapter.read_meta(start) if start else None
        template, chat, spoken = written_with(rows, self.model, config, earlier)
        written = written_time(self.output / CHECKPOINTS, resume, processes)
        told = tell_tokens(self.callbacks)
        prepared = prepare(rows, spoken, config, template=template, written=written, told=told)
        whole, facts, self.notes = prepared.encoded, prepared.facts, prepared.notes
        self.excluded += facts.left_out
        mx.random.seed(config.seed)
        base = describe(self.model)
        chosen, self.paths = _attached(self.model, method, start, earlier)
        self._attached = True
        mx.eval(self.model.model.parameters())
        self.trainable, self.parameters = adapter.count(self.model.model)
        earlier_run = self.output if resume else None
        config, reasons = settled(config, whole, self.model, earlier=earlier_run, processes=processes)
        self.config, self.notes = config, self.notes + reasons
        self.encoded = fitted(rows, whole, self.model, config)
        how: dict[str, Any] = {"template": template, "written": written, "seen": facts.seen}
        parts = parts_of(rows, self.encoded.examples, spoken, config, **how)
        self.measured_on, self.notes = parts.words, [*self.notes, *parts.notes]
        how = {"template": template, "chat": chat, "form": rows.format, "processes": processes}
        self.watch = watch(self.model, config, parts.validation, self._sets, **how)
        self.run = Run(
            self.model.model,
            parts.training,
            parts.validation,
            config=config,
            pad_id=pad_id(self.model),
            folder=self.output,
            processes=processes,
            watch=self.watch,
            rates=chosen.lr_multipliers() or None,
            identity={
                "method": chosen.NAME,
                "fields": asdict(chosen),
                "template": template,
                **chat.identity,
                "loss_on": config.loss_on,
                "written": written.isoformat(),
                "base": fingerprint(self.model.path),
                **self.watch.identity,
            },
        )
        if processes.writes:
            self.output.mkdir(parents=True, exist_ok=True)
        if resume:
            self._resume()
        self.meta = AdapterMeta(
            method=chosen,
            base=base,
            template=template,
            chat=chat,
            loss_on=config.loss_on,
            seen=sorted({*facts.seen, *(earlier.seen if earlier else ())}),
            training=self._record(rows.origin, facts, template),
        )
        adapter.note(self.model.model, self.meta)

    def _record(self, origin: str, facts: Facts, template: str) -> dict[str, Any]:
        """What the adapter's folder says of its training."""
        passes = None if self.config.steps else epochs(self.run.examples, self.config, self.processes.size)
        return {
            **asdict(self.config),
            "epochs": passes,
            "warmup": self.run.warmup,
            "template": template,
            "data": origin,
            "data_sha256": facts.digest,
            "rows": facts.rows,
        }

    def _resume(self) -> None:
        if self.run.can_resume():
            self.run.resume(self.notes.append)
            if self.run.step >= self.run.total:
                done = f"{self.output}: finished, all {counted(self.run.total, 'step')} are done"
                self.notes.append(f"{done}. To train on, give more --steps or --epochs")
        else:
            self.notes.append(f"{self.output}: has no checkpoint yet, starting from the beginning")
        if self.processes.writes:
            for name in (METRICS, SAMPLES):
                metrics.forget_after(self.output / name, self.run.step)

    def _hold_lock(self) -> None:
        """Keep other runs out of the folder until this one ends."""
        if self.processes.writes and not self._holds_lock:
            self._lock.enter_context(locked(self.output))
            self._lock.callback(setattr, self, "_holds_lock", False)
            self._holds_lock = True

    def _log(self, step: Measured) -> None:
        for logger in self._loggers:
            logger.log(step)
        if step.step == 0:
            for callback in self.callbacks:
                callback.on_start(step)

    def _told(self, step: Step) -> Step:
        """The step that the callbacks were told of; where one of them ends the run, `stopped`."""
        if continues(self.callbacks, step, self.run.checkpoint) or step.stopped or step.step == step.total:
            return step
        if self.processes.size > 1:  # all of them have to end after the same step
            self.stop()
            return step
        return replace(step, stopped=_CALLBACK)

    def _finish(self, seconds: float, stopped: str | None) -> TrainResult:
        """Save the adapter, of the best step if configured so, and draw the losses."""
        run, step, rows = self.run, self.run.step, list[dict[str, Any]]()
        if self.processes.writes:
            if stopped not in _SAVED:
                step = run.use_best() if self.config.best or self.config.patience else step
                self._save_adapter(step)
            rows = metrics.read(self.output / METRICS)
            if stopped not in _SAVED:
                with writing_to(self.output / PLOT):
                    data = self.meta.training["data"].rpartition("/")[2]
                    title = f"{self.meta.method.NAME} on {self.model.path.name}\n{data}"
                    metrics.plot(rows, self.output / PLOT, title=title)
                if not run.moved:
                    raise TrainingError(
                        f"{self.output}: {step} steps have not changed the adapter, which is saved as it "
                        f"began. Give more --steps, or a higher --lr than {self.config.lr:g}"
                    )
        return result_of(
            rows,
            adapter=self.output,
            method=self.meta.method.NAME,
            step=step,
            steps=run.step,
            seconds=seconds,
            stopped=stopped,
            trainable=self.trainable,
            parameters=self.parameters,
            rows=len(run.examples),
        )

    def _save_adapter(self, step: int) -> None:
        if not self.processes.writes:
            return
        for name, array in tree_flatten(self.model.model.trainable_parameters()):
            if not mx.isfinite(array).all().item():
                raise TrainingError(
                    f"{self.output}: not saved, since after step {step} the adapter's {name} holds values "
                    "that are not numbers. Lower --lr"
                )
        training = {**self.meta.training, "steps_done": step}
        adapter.save(self.model.model, self.output, meta=replace(self.meta, training=training))


def check_output(output: Path, resume: bool) -> None:
    """Raise OutputError when `output` holds something and the run does not resume."""
    if resume and not output.exists():
        raise OutputError(f"{output}: no such folder, so there is nothing to resume. Start without --resume")
    if output.is_file():
        raise OutputError(f"{output}: is a file. Choose another --output folder")
    if output.is_dir() and any(output.iterdir()) and not resume:
        raise OutputError(f"{output}: is not empty. Choose another --output, or go on with --resume")


def _attached(
    model: LanguageModel, method: Method | str, start: Path | None, earlier: AdapterMeta | None
) -> tuple[Method, list[str]]:
    """Put the adapter on the model: (its method, the layers' paths)."""
    if start and earlier:
        adapter.load(model, start)
        return earlier.method, list(adapter.layers(model.model))
    method = methods.make(method, {}) if isinstance(method, str) else method
    method = method.with_tokenizer(model.tokenizer)
    return method, list(adapter.attach(model, method))
