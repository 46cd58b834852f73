"""`mlx-adapters eval MODEL --task NAME`."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_adapters.cli.screen import say, table, track
from mlx_adapters.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from mlx_adapters.adapter import AdapterMeta
    from mlx_adapters.evaluate.score import Record, Score
    from mlx_adapters.model import Loaded

__all__ = ["command", "run_task", "score_row"]

COLUMNS = ["task", "accuracy", "95 % interval", "correct", "seen in training", "unseen", "paper's rule"]


def command(
    model: Annotated[str, typer.Argument(help="model folder or hub id")],
    task: Annotated[str, typer.Option(help="test sets, joined by commas: gsm8k, SVAMP, ...")],
    adapter: Annotated[
        Path | None, typer.Option(help="adapter folder; without it the base is measured")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="folder with NAME/test.json; default: the hub")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="use N items of each set, drawn by the seed")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts decoded together")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 256,
    template: Annotated[str | None, typer.Option(help="default: the adapter's, else alpaca")] = None,
    force_template: Annotated[bool, typer.Option(help="allow another template than the adapter's")] = False,
    seed: Annotated[int, typer.Option(help="draws the items of --limit")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file with a record of every item")] = None,
    json_: Annotated[bool, typer.Option("--json", help="print the scores as JSON")] = False,
) -> None:
    """Measure accuracy on the paper's test sets: greedy, batched, with the answers kept."""
    import json

    from mlx_adapters.evaluate import tasks

    chosen = [tasks.find(name.strip()) for name in task.split(",") if name.strip()]
    if output is not None and output.exists():
        raise OutputError(f"{output}: exists. Choose another --output, or remove it")
    sets = [(row, tasks.load_items(row, data_dir=data_dir, limit=limit, seed=seed)) for row in chosen]
    loaded, meta = _load(model, adapter)
    used = _template(meta, template, force_template)
    seen = frozenset(meta.seen) if meta else frozenset()
    records: list[Record] = []
    scores: list[Score] = []
    for row, items in sets:
        kept, score, rate = run_task(
            loaded, items, row.name, template=used, batch_size=batch_size, max_tokens=max_tokens, seen=seen
        )
        say(f"{row.name}: {rate:.2f} items/s")
        records += kept
        scores.append(score)
    report = {
        "model": model,
        "adapter": str(adapter) if adapter else None,
        "template": used,
        "decoding": "greedy",
        "scores": [asdict(score) for score in scores],
    }
    if output is not None:
        _write(output, json.dumps(report | {"records": [asdict(record) for record in records]}, indent=1))
    if json_:
        typer.echo(json.dumps(report, indent=1))
    else:
        table(COLUMNS, [score_row(score) for score in scores])


def run_task(loaded: "Loaded", items: Any, task: str, **options: Any) -> "tuple[list[Record], Score, float]":
    """Answer all items with progress on screen: (records in the items' order, score, items per second)."""
    from mlx_adapters.evaluate.score import evaluate, summarise

    started = time.perf_counter()
    done: list[Record] = []

    def answered() -> "Iterator[Record]":
        for record in evaluate(loaded.model, loaded.tokenizer, items, task, **options):
            done.append(record)
            yield record

    def text(_: Any) -> str:
        return f"accuracy {sum(record.correct for record in done) / len(done):.1%}"

    for _ in track(task, answered(), len(items), text):
        pass
    records = sorted(done, key=lambda record: record.index)
    return records, summarise(records), len(records) / (time.perf_counter() - started)


def score_row(score: "Score") -> list[str]:
    """A score as the cells of `COLUMNS`."""

    def part(correct: int, total: int) -> str:
        return f"{correct / total:.1%} of {total}" if total else "none"

    return [
        score.task,
        f"{score.accuracy:.1%}",
        f"{score.low:.1%} - {score.high:.1%}",
        f"{score.correct}/{score.total}",
        part(score.seen_correct, score.seen_total),
        part(score.unseen_correct, score.unseen_total),
        f"{score.paper_accuracy:.1%}",
    ]


def _load(model: str, folder: Path | None) -> "tuple[Loaded, AdapterMeta | None]":
    from mlx_adapters import adapter
    from mlx_adapters import model as models

    if folder is not None:
        adapter.read_meta(folder)  # a wrong folder is told before the model loads
    loaded = models.load(model, answering=True)
    meta = adapter.load(loaded, folder) if folder is not None else None
    return loaded, meta


def _template(meta: "AdapterMeta | None", wish: str | None, force: bool) -> str:
    from mlx_adapters.data.templates import TEMPLATES
    from mlx_adapters.errors import unknown

    if wish is not None and wish not in TEMPLATES:
        raise ConfigError(unknown("template", wish, TEMPLATES))
    trained = meta.template if meta else ""
    if trained and wish and wish != trained and not force:
        raise ConfigError(
            f"the adapter was trained with the template {trained}, not {wish}. "
            "Leave --template out, or add --force-template"
        )
    return wish or trained or "alpaca"


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name("." + file.name)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(file)
