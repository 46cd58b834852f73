"""Train and measure one cell of a study, going on from what its folder already holds.

    cells/ID/settings.json        what the cell is made from
    cells/ID/adapter/             the adapter with its checkpoints and losses
    cells/ID/trained.json         the training is done
    cells/ID/eval.partial.jsonl   the answers so far, then eval.json
    cells/ID/cell.json            the result, or the error: written last

What is done is not done again.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_adapters.errors import OutputError, writing_to
from mlx_adapters.files.writing import write_whole
from mlx_adapters.study.grid import GENERATED, Cell, Study

__all__ = ["BASE", "cell_folder", "finished", "parameters", "run_cell", "same_rules", "write_json"]

BASE = "base"
Train = Callable[[Any], float]
Answer = Callable[..., Any]


def cell_folder(output: Path, name: str) -> Path:
    """Where a cell keeps what it makes."""
    return output / "cells" / name


def write_json(file: Path, value: Any) -> None:
    """Write `file` whole or not at all."""
    with writing_to(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(value, indent=1) + "\n")


def finished(output: Path, name: str) -> dict[str, Any] | None:
    """The result of a cell, or its error; None while it is not done."""
    file = cell_folder(output, name) / "cell.json"
    found: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
    return found


def same_rules(study: Study, measured: dict[str, Any], file: Path) -> None:
    """Raise OutputError where a cell's answers were read by other rules than the study's other cells are."""
    if measured.get("reading") != study.settings.rules:
        before = measured.get("reading") or "those of an earlier version"
        raise OutputError(
            f"{file}: its answers were read by other rules ({before}; now {study.settings.rules}), and one "
            f"table must not hold both. Remove {file.parent}/cell.json and eval.json to measure it again"
        )


def run_cell(
    study: Study,
    cell: Cell | None,
    output: Path,
    *,
    train: Train,
    answer: Answer,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Do what is left of a cell (None: the base model) and return its result.

    `train(session)` runs a prepared session and returns its seconds; `answer(loaded, items, task, ...)` is
    `cli.eval.run_task`. Raises OutputError when the folder was made with other settings.
    """
    name = cell.id if cell else BASE
    folder = cell_folder(output, name)
    _same_settings(folder, {"study": study.common(), "cell": asdict(cell) if cell else None})
    trained = _trained(study, cell, folder, train, warn) if cell else {}
    scores, seconds = _measured(study, folder, answer, adapter=cell is not None)
    result = {
        "id": name,
        "status": "done",
        "method": cell.method if cell else BASE,
        "placement": cell.placement if cell else "",
        "size": cell.size if cell else "",
        "lr": cell.train.lr if cell else None,
        "seed": cell.train.seed if cell else None,
        **trained,
        "scores": scores,
        "reading": study.settings.rules,
        "eval_seconds": seconds,
    }
    write_json(folder / "cell.json", result)
    return result


def _same_settings(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not file.exists():
        write_json(file, settings)
        return
    before = json.loads(file.read_text())
    if before == settings:
        return
    changed = [
        f"{key} was {(before.get(part) or {}).get(key)!r}, now {value!r}"
        for part, values in settings.items()
        for key, value in (values or {}).items()
        if (before.get(part) or {}).get(key) != value
    ]
    raise OutputError(f"{folder}: made with other settings ({'; '.join(changed)}). Use another --output")


def _trained(
    study: Study, cell: Cell, folder: Path, train: Train, warn: Callable[[str], None]
) -> dict[str, Any]:
    from mlx_adapters import methods
    from mlx_adapters.data import wordproblems
    from mlx_adapters.data.sources import Rows, load_rows
    from mlx_adapters.models import load as model
    from mlx_adapters.train.trainer import Trainer

    file, adapter = folder / "trained.json", folder / "adapter"
    if file.exists():
        done: dict[str, Any] = json.loads(file.read_text())
        return done
    settings = study.settings
    if settings.data == GENERATED:
        rows = Rows(wordproblems.generate(settings.rows), "instruction", "generated word problems")
    else:
        rows = load_rows(settings.data)
    excluded = [Path(part.strip()) for part in (settings.exclude or "").split(",") if part.strip()]
    session = Trainer(
        model.load(study.model),
        rows,
        methods.make(cell.method, cell.fields),
        output=adapter,
        exclude=excluded,
        resume=adapter.exists(),
        **vars(cell.train),
    )
    for note in session.notes:
        warn(note)
    seconds = train(session)
    facts = {
        "trainable": session.trainable,
        "parameters": session.parameters,
        "steps": session.run.step,
        "rows": len(session.run.examples),
        "excluded": session.excluded,
        "truncated": session.encoded.truncated,
        "train_seconds": seconds,
    }
    write_json(file, facts)
    return facts


def _measured(
    study: Study, folder: Path, answer: Answer, *, adapter: bool
) -> tuple[list[dict[str, Any]], float]:
    from mlx_adapters import adapter as adapters
    from mlx_adapters.data.templates import chosen_template
    from mlx_adapters.evaluate import tasks
    from mlx_adapters.evaluate.records import RecordFile
    from mlx_adapters.generate.decode import Decoding
    from mlx_adapters.models import load as model

    settings, file = study.settings, folder / "eval.json"
    if file.exists():  # killed between the answers and the result
        report = json.loads(file.read_text())
        same_rules(study, report, file)
        return report["scores"], report["seconds"]
    sets = tasks.load(
        settings.tasks,
        data_dir=Path(settings.data_dir) if settings.data_dir else None,
        limit=settings.limit,
        seed=settings.test_seed,
    )
    loaded = model.load(study.model, answering=True)
    meta = adapters.load(loaded, folder / "adapter") if adapter else None
    template = chosen_template(meta.template if meta else None, study.cells[0].train.template)
    decoding = Decoding(kind=settings.decoding)
    about = {
        "model": study.model,
        "template": template,
        "decoding": settings.decoding,
        "settings": asdict(decoding) | {"max_tokens": settings.max_tokens},
        "reading": settings.rules,
    }
    started, scores, answers = time.perf_counter(), [], []
    answered_by = {"study": study.common(), "template": template, "reading": settings.rules}
    with RecordFile(file, answered_by, resume=True) as records:
        for task, items in sets:
            kept, score, _ = answer(
                loaded,
                items,
                task,
                file=records,
                template=template,
                batch_size=settings.batch_size,
                max_tokens=settings.max_tokens or task.max_tokens,
                seen=frozenset(meta.seen) if meta else frozenset(),
                decoding=decoding,
                reading=settings.reading,
            )
            scores.append(asdict(score))
            answers += [asdict(record) for record in kept]
        seconds = time.perf_counter() - started
        records.finish(about | {"scores": scores, "seconds": seconds, "records": answers})
    return scores, seconds


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
