"""Train and measure one cell of a study, continuing from what its folder already holds.

    cells/ID/settings.json        what the cell is made from
    cells/ID/adapter/             the adapter with its checkpoints and losses
    cells/ID/trained.json         the training is done
    cells/ID/eval.partial.jsonl   the answers so far, then eval.json
    cells/ID/cell.json            the result, or the error: written last

What is done is not done again.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from mlx_adapters import methods
from mlx_adapters.data import wordproblems
from mlx_adapters.data.sources import Rows, load_rows
from mlx_adapters.data.templates import asked
from mlx_adapters.errors import AdaptersError, OutputError
from mlx_adapters.evaluate import tasks
from mlx_adapters.evaluate.ask import Asking, answer
from mlx_adapters.evaluate.records import RecordFile
from mlx_adapters.evaluate.run import Part
from mlx_adapters.evaluate.score import summarise
from mlx_adapters.fields import current
from mlx_adapters.files.writing import write_json
from mlx_adapters.generate.decode import Decoding
from mlx_adapters.study.grid import GENERATED, Cell, Study
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.trainer import Trainer

__all__ = [
    "BASE",
    "CellRun",
    "Result",
    "Training",
    "cell_folder",
    "finished",
    "parameters",
    "same_rules",
]

BASE = "base"
Result = dict[str, Any]


def cell_folder(output: Path, name: str) -> Path:
    """Where a cell keeps what it makes."""
    return output / "cells" / name


def finished(output: Path, name: str) -> Result | None:
    """The result of a cell, or its error; None while it is not done."""
    file = cell_folder(output, name) / "cell.json"
    found: Result | None = json.loads(file.read_text()) if file.exists() else None
    return found


def same_rules(study: Study, measured: Result, file: Path) -> None:
    """Raise OutputError where a cell's answers were read by other rules than the study's other cells are."""
    if measured.get("reading") != study.settings.rules:
        before = measured.get("reading") or "those of an earlier version"
        raise OutputError(
            f"{file}: its answers were read by other rules ({before}; now {study.settings.rules}), and one "
            f"table must not hold both. Remove {file.parent}/cell.json and eval.json to measure it again"
        )


@dataclass
class Training:
    """The training of a cell; `seconds` is None until it has run. Who shows progress iterates over
    `trainer`; otherwise `run` does."""

    trainer: Trainer
    seconds: float | None = None

    def run(self) -> None:
        """Train to the end."""
        for _ in self.trainer:
            pass
        self.seconds = self.trainer.result.seconds


class CellRun:
    """A cell (None: the base model) with what is left to do of it.

        with CellRun(study, cell, output) as run:
            for phase in run.phases():
                phase.run()
        run.result

    What goes wrong inside the block becomes the cell's result and stops no other cell, except an OutputError:
    a full disk, or a folder that was made with other settings, would stop the next cell too.
    """

    def __init__(
        self, study: Study, cell: Cell | None, output: Path, *, warn: Callable[[str], None] = print
    ) -> None:
        self.study, self.cell, self.warn = study, cell, warn
        self.name = cell.id if cell else BASE
        self.folder = cell_folder(output, self.name)
        self.result: Result | None = None

    def __enter__(self) -> "CellRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, OutputError) or not isinstance(
            error, (AdaptersError, RuntimeError, ValueError, MemoryError)
        ):
            return False
        text = " ".join(str(error).split()) or type(error).__name__
        self.result = failure(self.folder, self.name, text, method=self.cell.method if self.cell else BASE)
        return True

    def phases(self) -> Iterator["Training | Part"]:
        """The training and the test sets that are left, one after the other. A phase that the caller has not
        run is run when the next one is asked for."""
        cell, study = self.cell, self.study
        _same_settings(self.folder, {"study": study.common(), "cell": asdict(cell) if cell else None})
        trained: Result = {}
        if cell is not None:
            yield from self._training(cell)
            trained = json.loads((self.folder / "trained.json").read_text())
        yield from self._testing()
        measured = json.loads((self.folder / "eval.json").read_text())
        self.result = {
            "id": self.name,
            "status": "done",
            "method": cell.method if cell else BASE,
            "placement": cell.placement if cell else "",
            "size": cell.size if cell else "",
            "lr": cell.train.lr if cell else None,
            "seed": cell.train.seed if cell else None,
            **trained,
            "scores": measured["scores"],
            "reading": study.settings.rules,
            "eval_seconds": measured["seconds"],
        }
        write_json(self.folder / "cell.json", self.result)

    def _training(self, cell: Cell) -> Iterator[Training]:
        from mlx_adapters.models.load import load

        file, adapter, settings = self.folder / "trained.json", self.folder / "adapter", self.study.settings
        if file.exists():
            return
        if settings.data == GENERATED:
            rows = Rows(wordproblems.generate(settings.rows), "instruction", "generated word problems")
        else:
            rows = load_rows(settings.data)
        excluded = [Path(part.strip()) for part in (settings.exclude or "").split(",") if part.strip()]
        trainer = Trainer(
            load(self.study.model),
            rows,
            methods.make(cell.method, cell.fields),
            output=adapter,
            exclude=excluded,
            resume=adapter.exists(),
            **vars(cell.train),
        )
        for note in trainer.notes:
            self.warn(note)
        training = Training(trainer)
        yield training
        if training.seconds is None:
            training.run()
        facts = {
            "trainable": trainer.trainable,
            "parameters": trainer.parameters,
            "steps": trainer.run.step,
            "rows": len(trainer.run.examples),
            "excluded": trainer.excluded,
            "truncated": trainer.encoded.truncated,
            "train_seconds": training.seconds,
        }
        write_json(file, facts)
        del (
            trainer,
            training.trainer,
        )  # the model is loaded again for the test sets: a study holds one at a time

    def _testing(self) -> Iterator[Part]:
        from mlx_adapters import adapter as adapters
        from mlx_adapters.models.load import load

        study, settings, file = self.study, self.study.settings, self.folder / "eval.json"
        if file.exists():  # killed between the answers and the result
            same_rules(study, json.loads(file.read_text()), file)
            return
        sets = tasks.load(
            settings.tasks,
            data_dir=Path(settings.data_dir) if settings.data_dir else None,
            limit=settings.limit,
            seed=settings.test_seed,
        )
        loaded = load(study.model, answering=True)
        meta = adapters.load(loaded, self.folder / "adapter") if self.cell else None
        trained = study.cells[0].train
        kwargs = trained.chat_template_kwargs
        way = asked(trained.template, kwargs, fallback="chat" if kwargs else "alpaca")
        if meta and meta.template:
            way = asked(None, None, (meta.template, meta.chat))
        template = way.template
        asking = Asking(
            template=template,
            chat=way.chat,
            decoding=Decoding(kind=settings.decoding),
            reading=settings.reading,
            batch_size=settings.batch_size,
            max_tokens=settings.max_tokens,
            seen=frozenset(meta.seen) if meta else frozenset(),
        )
        ask = partial(answer, loaded.model, loaded.tokenizer)
        answered_by = {"study": study.common(), "template": template, "reading": settings.rules}
        started = time.perf_counter()
        with RecordFile(file, answered_by, resume=True) as records:
            parts = [Part(task, items, asking, ask, records) for task, items in sets]
            for part in parts:
                yield part
                part.run()
            report = {
                "model": study.model,
                "template": template,
                "decoding": settings.decoding,
                "settings": asking.settings,
                "reading": settings.rules,
                "scores": [asdict(summarise(part.records)) for part in parts],
                "seconds": time.perf_counter() - started,
                "records": [asdict(record) for part in parts for record in part.records],
            }
            records.finish(report)


def failure(folder: Path, name: str, error: str, *, method: str) -> Result:
    """Write down and return that a cell failed."""
    result = {"id": name, "status": "failed", "error": error, "method": method}
    write_json(folder / "cell.json", result)
    return result


def _same_settings(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not file.exists():
        write_json(file, settings)
        return
    before = json.loads(file.read_text())
    if (cell := before.get("cell")) and "train" in cell:
        cell["train"] = _of_today(cell["train"])
    if before == settings:
        return
    changed = [
        f"{key} was {(before.get(part) or {}).get(key)!r}, now {value!r}"
        for part, values in settings.items()
        for key, value in (values or {}).items()
        if (before.get(part) or {}).get(key) != value
    ]
    raise OutputError(f"{folder}: made with other settings ({'; '.join(changed)}). Use another --output")


def _of_today(train: dict[str, Any]) -> dict[str, Any]:
    """The settings of a training as today's `TrainConfig` has them: there were fewer, with other names."""
    if "cutoff" in train:  # before 0 rows of validation could be told from none that were asked for
        train = train | {"validation": train.get("validation") or None}
    return asdict(TrainConfig()) | current(TrainConfig, train)


def parameters(study: Study) -> dict[str, int]:
    """{cell: trainable parameters}, from the model's configuration alone: no weight is read."""
    from mlx_adapters import adapter, methods
    from mlx_adapters.models import config as model_config
    from mlx_adapters.models import load as model

    config = (
        model_config.normalise(study.config) if study.config else model.read_config(model.locate(study.model))
    )
    network, arguments = model_config.classes(config)
    found = {}
    for cell in study.cells:
        empty = network(arguments.from_dict(config))  # its arrays are never computed
        adapter.attach(empty, methods.make(cell.method, cell.fields), model_type=config["model_type"])
        found[cell.id] = adapter.count(empty)[0]
    return found
