"""From rows to an adapter folder: what `mlx-adapters train` does, as a library.

    session = prepare(load("model"), load_rows("data.jsonl"), method=LoRA(),
                      config=TrainConfig(), output=Path("adapter"))
    for step in session:
        print(step.loss)
    session.finish()

Iterating trains, a step at a time; `finish` saves.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_adapters import adapter
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.data.overlap import item_hash, row_text, rows_texts, seen_hashes
from mlx_adapters.data.sources import FORMATS, Rows, digest, load_rows, notes, read_rows
from mlx_adapters.data.templates import default_template
from mlx_adapters.data.tokens import Encoded, Example, encode, end_id
from mlx_adapters.errors import DataError, OutputError, TrainingError, counted, writing_to
from mlx_adapters.evaluate.tasks import load_file
from mlx_adapters.methods.base import Method
from mlx_adapters.models.chat_template import written_at
from mlx_adapters.models.limits import check_ids, vocabulary
from mlx_adapters.models.load import LanguageModel, describe, fingerprint
from mlx_adapters.train import checkpoint, metrics
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.distributed import Processes
from mlx_adapters.train.length import epochs
from mlx_adapters.train.loggers import Logger, open_loggers
from mlx_adapters.train.loop import CHECKPOINTS, Run, Step

__all__ = ["Session", "check_output", "excluded_hashes", "prepare"]

METRICS, PLOT = "metrics.jsonl", "loss.png"


@dataclass(frozen=True, kw_only=True)
class Session:
    """A prepared run. Iterate to train; then `finish`. The counts say what became of the rows."""

    loaded: LanguageModel
    run: Run
    meta: AdapterMeta
    output: Path
    paths: list[str]
    encoded: Encoded
    excluded: int
    trainable: int
    parameters: int
    loggers: list[Logger]

    def __iter__(self) -> Iterator[Step]:
        try:
            yield from self.run.steps(self._log)
        finally:
            for logger in self.loggers:
                logger.close()

    def _log(self, step: Step) -> None:
        for logger in self.loggers:
            logger.log(step)

    def save(self) -> None:
        """Save what there is now: the adapter, and a checkpoint to resume from."""
        self.run.save()
        self._save_adapter(self.run.step)

    def finish(self) -> int:
        """Save the adapter, of the best step if configured so, and draw the losses; returns its step.

        Raises TrainingError when what was saved is where the run began: it changes nothing.
        """
        config = self.run.config
        if not self.run.processes.writes:
            return self.run.step
        step = self.run.use_best() if config.best or config.patience else self.run.step
        self._save_adapter(step)
        rows = metrics.read(self.output / METRICS)
        with writing_to(self.output / PLOT):
            metrics.plot(
                rows, self.output / PLOT, title=f"{self.meta.method.NAME} on {self.loaded.path.name}"
            )
        if not self.run.moved:
            raise TrainingError(
                f"{self.output}: {step} steps have not changed the adapter, which is saved as it began. Give "
                f"more --steps, or a higher --lr than {config.lr:g}"
            )
        return step

    def _save_adapter(self, step: int) -> None:
        if not self.run.processes.writes:
            return
        for name, array in tree_flatten(self.loaded.model.trainable_parameters()):
            if not mx.isfinite(array).all().item():
                raise TrainingError(
                    f"{self.output}: not saved, since after step {step} the adapter's {name} holds values "
                    "that are not numbers. Lower --lr"
                )
        training = {**self.meta.training, "steps_done": step}
        adapter.save(self.loaded.model, self.output, meta=replace(self.meta, training=training))


def prepare(
    loaded: LanguageModel,
    rows: Rows,
    *,
    method: Method,
    config: TrainConfig,
    output: Path,
    exclude: frozenset[str] = frozenset(),
    start: Path | None = None,
    resume: bool = False,
    log: Sequence[str] = (),
    processes: Processes | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> Session:
    """Encode the rows, attach the adapter, and set up the run (or go on with the one in `output`).

    `start` is an adapter folder to go on from, ours or PEFT's: its method counts then. Rows whose question's
    hash is in `exclude` are left out. `log` names further loggers besides the JSON lines. Of several
    `processes` the first one writes. Raises OutputError when `output` holds something and `resume` is not
    set.
    """
    processes = processes or Processes()
    if processes.writes:
        check_output(output, resume)
    for note in notes(rows):
        warn(note)
    kept, excluded = _select(rows, config, exclude)
    earlier = adapter.read_meta(start) if start else None
    template = config.template or (earlier.template if earlier else "") or default_template(rows.format)
    moment = _moment(output, resume, processes)
    encoded = _encoded(kept, loaded, template, config, moment)
    training, validation = _split(encoded.examples, config)
    mx.random.seed(config.seed)
    base = describe(loaded)
    if earlier and start:
        method = earlier.method
        adapter.load(loaded, start)
        paths = list(adapter.layers(loaded.model))
    else:
        method = method.with_tokenizer(loaded.tokenizer)
        paths = list(adapter.attach(loaded, method))
    mx.eval(loaded.model.parameters())
    trainable, parameters = adapter.count(loaded.model)
    run = Run(
        loaded.model,
        training,
        validation,
        config=config,
        pad_id=_pad_id(loaded),
        folder=output,
        processes=processes,
        rates=method.lr_multipliers() or None,
        identity={
            "method": method.NAME,
            "fields": asdict(method),
            "template": template,
            "loss_on": config.loss_on,
            "written": moment.isoformat(),
            "base": fingerprint(loaded.path),
        },
    )
    if processes.writes:
        output.mkdir(parents=True, exist_ok=True)
    if resume:
        _resume(run, output, warn)
    seen = set(seen_hashes(rows_texts(kept)))
    meta = AdapterMeta(
        method=method,
        base=base,
        template=template,
        loss_on=config.loss_on,
        seen=sorted(seen | set(earlier.seen if earlier else ())),
        training={
            **asdict(config),
            "epochs": None if config.steps else epochs(training, config, processes.size),
            "warmup": run.warmup,
            "template": template,
            "data": kept.origin,
            "data_sha256": digest(kept.rows),
            "rows": len(kept.rows),
        },
    )
    return Session(
        loaded=loaded,
        run=run,
        meta=meta,
        output=output,
        paths=paths,
        encoded=encoded,
        excluded=excluded,
        trainable=trainable,
        parameters=parameters,
        loggers=open_loggers(log, output, meta.training) if processes.writes else [],
    )


def _encoded(
    rows: Rows, loaded: LanguageModel, template: str, config: TrainConfig, moment: datetime
) -> Encoded:
    with written_at(moment):
        encoded = encode(
            rows, loaded.tokenizer, template=template, cutoff=config.cutoff, loss_on=config.loss_on
        )
    check_ids(loaded.model, (example.ids for example in encoded.examples), loaded.tokenizer)
    return encoded


def _moment(output: Path, resume: bool, processes: Processes) -> datetime:
    """When the rows are written, for templates that write a date: now, or as the run that is resumed had it.
    The first process says, for another may be past midnight."""
    said = checkpoint.setting(output / CHECKPOINTS, "written") if resume and processes.writes else None
    moment = datetime.fromisoformat(said) if isinstance(said, str) else datetime.now()
    parts = processes.from_first(mx.array(moment.timetuple()[:6], dtype=mx.int32)).tolist()
    year, month, day, hour, minute, second = parts
    return datetime(year, month, day, hour, minute, second)


def _resume(run: Run, output: Path, warn: Callable[[str], None]) -> None:
    if run.can_resume():
        run.resume(warn)
    else:
        warn(f"{output}: has no checkpoint yet, starting from the beginning")
    if run.processes.writes:
        metrics.forget_after(output / METRICS, run.step)


def check_output(output: Path, resume: bool) -> None:
    """Raise OutputError when `output` holds something and the run does not resume."""
    if resume and not output.exists():
        raise OutputError(f"{output}: no such folder, so there is nothing to resume. Start without --resume")
    if output.is_file():
        raise OutputError(f"{output}: is a file. Choose another --output folder")
    if output.is_dir() and any(output.iterdir()) and not resume:
        raise OutputError(f"{output}: is not empty. Choose another --output, or go on with --resume")


def excluded_hashes(files: Sequence[Path]) -> frozenset[str]:
    """Hashes of the questions in test files, of a form of training data or of one that `eval` takes: rows
    that must not be trained on."""
    return frozenset(item_hash(text) for file in files for text in _questions(file))


def _questions(file: Path) -> list[str]:
    first = next(read_rows(file), ("", None))[1] if file.is_file() else None
    first = first if isinstance(first, dict) else {}
    form_of_training = any(set(fields) <= set(first) for fields in FORMATS.values())
    if "answer" not in first or form_of_training:
        return rows_texts(load_rows(str(file)))
    _, items = load_file(file)
    return [row_text({"instruction": item.instruction, "input": item.input}, "instruction") for item in items]


def _select(rows: Rows, config: TrainConfig, exclude: frozenset[str]) -> tuple[Rows, int]:
    kept = [row for row in rows.rows if item_hash(row_text(row, rows.format)) not in exclude]
    excluded = len(rows.rows) - len(kept)
    kept = kept[: config.limit]
    if not kept:
        raise DataError(
            f"{rows.origin}: all rows ({excluded}) are in the excluded files, nothing is left to train on"
        )
    return replace(rows, rows=kept), excluded


def _split(examples: list[Example], config: TrainConfig) -> tuple[list[Example], list[Example]]:
    """The held-out rows are drawn by the seed, so that they are no run of neighbours in the file."""
    if config.validation == 0:
        return examples, []
    if config.validation >= len(examples):
        rows = counted(len(examples), "row")
        raise DataError(f"validation={config.validation} leaves nothing of {rows} to train on")
    order = np.random.default_rng(config.seed).permutation(len(examples))
    return (
        [examples[i] for i in sorted(order[config.validation :])],
        [examples[i] for i in order[: config.validation]],
    )


def _pad_id(loaded: LanguageModel) -> int:
    """What fills rows up, which no target and no token before it sees: any id that the model has."""
    known = vocabulary(loaded.model)
    wished = (loaded.tokenizer.pad_token_id, end_id(loaded.tokenizer))
    return next((id for id in wished if id is not None and (known is None or 0 <= id < known)), 0)
