"""`mlx-adapters eval MODEL --task NAME`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_adapters.cli import complete
from mlx_adapters.cli.complete import DECODINGS
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import say, table, track
from mlx_adapters.errors import ConfigError, counted, unknown
from mlx_adapters.evaluate.protocol import PROTOCOLS, chosen

if TYPE_CHECKING:
    from mlx_adapters.adapter import AdapterMeta
    from mlx_adapters.evaluate.records import RecordFile
    from mlx_adapters.evaluate.score import Record, Score
    from mlx_adapters.evaluate.tasks import Item, Task
    from mlx_adapters.evaluate.workers import Workers
    from mlx_adapters.models.load import LanguageModel

__all__ = ["columns", "command", "run_task", "score_row"]

_KEYS = ("model", "adapter", "adapter_sha256", "template", "decoding", "settings", "reading", "data", "tasks")


@reporting(*_KEYS, "limit", "seed", "scores")
def command(
    model: Annotated[str, typer.Argument(help="model folder or hub id")],
    task: Annotated[
        str,
        typer.Option(
            help="test sets, joined by commas: names (gsm8k, boolq, ...), groups (math, math-2023, "
            "commonsense, all), or .json and .jsonl files of your own",
            autocompletion=complete.tasks,
        ),
    ],
    adapter: Annotated[
        Path | None, typer.Option(help="adapter folder; without it the base is measured")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="folder with NAME/test.json; default: the hub")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="use N items of each set, drawn by the seed")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="rows decoded together [default: what memory allows, up to 64]")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="share the items among processes, each with its own model [default: 1; on a CPU 2 for 128 "
            "items or more, where memory allows and a second core is free]",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="longest answer [default: the paper's, 256 or 32]")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="paper: four beams, the template llm-adapters, the paper's longest answers, and its reading",
            autocompletion=complete.among(PROTOCOLS),
        ),
    ] = None,
    decoding: Annotated[
        str | None,
        typer.Option(
            help="greedy; beam (4 beams, the paper's numbers); sample; likelihood of the choices "
            "[default: greedy]",
            autocompletion=complete.among(DECODINGS),
        ),
    ] = None,
    beams: Annotated[
        int | None, typer.Option("--num-beams", min=1, help="of --decoding beam [default: 4]")
    ] = None,
    temperature: Annotated[float, typer.Option(help="of --decoding sample")] = 0.1,
    top_p: Annotated[float, typer.Option(help="of --decoding sample")] = 0.75,
    top_k: Annotated[int, typer.Option(help="of --decoding sample")] = 40,
    choices: Annotated[
        str,
        typer.Option(
            help="likelihood of: label (the paper's answer) or text (lm-eval's cloze)",
            autocompletion=complete.among(complete.SCORED),
        ),
    ] = "label",
    template: Annotated[
        str | None,
        typer.Option(help="default: the adapter's, else alpaca", autocompletion=complete.templates),
    ] = None,
    force_template: Annotated[bool, typer.Option(help="allow another template than the adapter's")] = False,
    prompt: Annotated[
        str | None, typer.Option(help="question of an own file from its fields: '{text} Options: {options}'")
    ] = None,
    label: Annotated[str, typer.Option(help="field of the right answer in an own file")] = "answer",
    seed: Annotated[int, typer.Option(help="draws the items of --limit, and samples")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file with a record of every item")] = None,
    resume: Annotated[bool, typer.Option(help="go on with the interrupted records of --output")] = False,
) -> None:
    """Measure accuracy on the paper's test sets or your own."""
    from mlx_adapters.evaluate import tasks
    from mlx_adapters.evaluate.answers import RULES
    from mlx_adapters.evaluate.score import none_right
    from mlx_adapters.models.load import locate, read_config
    from mlx_adapters.models.origin import remembered

    if resume and output is None:
        raise ConfigError("--resume goes on with the records of --output: give the same --output")
    given = {"decoding": decoding, "num_beams": beams, "template": template, "max_tokens": max_tokens}
    settled = chosen(protocol, given, flag="--")
    decoding, reading = settled["decoding"], settled["reading"]
    options = _decoding(decoding, choices, settled["num_beams"], temperature, top_p, top_k, seed)
    if decoding != "likelihood":
        options["reading"] = reading
    sets = tasks.load(task, data_dir=data_dir, limit=limit, seed=seed, prompt=prompt, label=label)
    meta = _meta(adapter)
    folder = locate(model)
    fused = remembered(read_config(folder)).get("template", "")
    used = _template((meta.template if meta else "") or fused, settled.get("template"), force_template)
    settings = {
        "model": model,
        "adapter": str(adapter) if adapter else None,
        "adapter_sha256": _digest(adapter),
        "template": used,
        "decoding": decoding,
        "settings": _plain(options) | {"max_tokens": max_tokens},
        "reading": RULES[reading] if "reading" in options else None,
        "data": str(data_dir) if data_dir else "hub",
        "tasks": [one.name for one, _ in sets],
        "limit": limit,
        "seed": seed,
    }
    count = processes or _processes(folder, sum(len(items) for _, items in sets))
    with _records(output, settings, resume) as file, _answering(folder, adapter, count) as loaded:
        common: dict[str, Any] = {
            "template": used,
            "batch_size": batch_size,
            "seen": frozenset(meta.seen) if meta else frozenset(),
        }
        records: list[Record] = []
        scores: list[Score] = []
        for row, items in sets:
            if decoding != "likelihood":
                options["max_tokens"] = max_tokens or row.max_tokens
            kept, score, rate = run_task(loaded, items, row, file=file, **common, **options)
            say(f"{row.name}: {rate:.2f} items/s")
            records += kept
            scores.append(score)
        result = settings | {"scores": [asdict(score) for score in scores]}
        if file is not None:
            file.finish(result | {"records": [asdict(record) for record in records]})

    def words() -> None:
        table(columns(decoding, reading), [score_row(score, reading) for score in scores])
        for line in filter(None, map(none_right, scores)):
            typer.echo(line)

    report(result, words)


def run_task(
    loaded: "LanguageModel | Workers",
    items: "list[Item]",
    task: "Task | str",
    *,
    file: "RecordFile | None" = None,
    go_on: str = "go on with --resume",
    **options: Any,
) -> "tuple[list[Record], Score, float]":
    """Answer all items with progress on screen: (records in the items' order, score, items per second).

    Items that `file` has a record of are not asked again; new records are added to it. `go_on` is what to do
    after an interruption. `options` are those of `evaluate`, or of `evaluate_likelihood` when `scored` is
    among them.
    """
    from mlx_adapters.cpu import threads
    from mlx_adapters.evaluate import score as scoring
    from mlx_adapters.evaluate.tasks import find
    from mlx_adapters.evaluate.workers import Workers

    task = find(task) if isinstance(task, str) else task
    if isinstance(loaded, Workers):
        run = partial(loaded.records, items, task)
    else:
        run = partial(scoring.answered, loaded.model, loaded.tokenizer, items, task)
    done: list[Record] = file.done(task.name, items) if file else []
    before = len(done)
    started = time.perf_counter()

    def answered() -> "Iterator[Record]":
        known = frozenset(record.index for record in done)
        for record in run(done=known, **options):
            done.append(record)
            if file is not None:
                file.append(record)
            yield record

    def text(_: Any) -> str:
        return f"accuracy {sum(record.correct for record in done) / len(done):.1%}"

    if words := threads.in_words():
        say(words)
    if before:
        say(f"{task.name}: {before} of {counted(len(items), 'item')} done already")
    try:
        for _ in track(task.name, answered(), len(items) - before, text):
            pass
    except KeyboardInterrupt:
        if file is not None:
            kept = f"{len(done)} of {counted(len(items), 'item')} of {task.name}"
            say(f"saved: {kept}, in {file.path}; {go_on}")
        raise
    seconds = time.perf_counter() - started
    records = sorted(done, key=lambda record: record.index)
    return records, scoring.summarise(records), (len(records) - before) / seconds


def columns(decoding: str = "greedy", reading: str = "strict") -> list[str]:
    """The heads of `score_row`."""
    second = "strict reading" if reading == "paper" else "paper's rule"
    second = "per character" if decoding == "likelihood" else second
    return ["task", "accuracy", "95 % interval", "correct", "seen in training", "near", "unseen", second]


def score_row(score: "Score", reading: str = "strict") -> list[str]:
    """A score as the cells of `columns`. The unseen share has its own interval where some items were seen."""

    def part(correct: int, total: int) -> str:
        return f"{correct / total:.1%} of {total}" if total else "none"

    unseen = part(score.unseen_correct, score.unseen_total)
    if 0 < score.unseen_total < score.total:
        unseen += f" ({score.unseen_low:.1%} - {score.unseen_high:.1%})"
    second = score.strict_accuracy if reading == "paper" else score.paper_accuracy
    second = second if score.norm_accuracy is None else score.norm_accuracy
    return [
        score.task,
        f"{score.accuracy:.1%}",
        f"{score.low:.1%} - {score.high:.1%}",
        f"{score.correct}/{score.total}",
        part(score.seen_correct, score.seen_total),
        part(score.near_correct, score.near_total),
        unseen,
        f"{second:.1%}" if second is not None else "",
    ]


def _decoding(
    kind: str, choices: str, beams: int, temperature: float, top_p: float, top_k: int, seed: int
) -> dict[str, Any]:
    """The options of `evaluate` or `evaluate_likelihood`."""
    from mlx_adapters.evaluate.score import SCORED
    from mlx_adapters.generate.decode import Decoding

    if kind not in DECODINGS:
        raise ConfigError(unknown("decoding", kind, DECODINGS))
    if choices not in SCORED:
        raise ConfigError(unknown("value of --choices", choices, SCORED))
    if kind == "likelihood":
        return {"scored": choices}
    settings: dict[str, Any] = {"beam": {"beams": beams}, "greedy": {}}.get(
        kind, {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    )
    return {"decoding": Decoding(kind=kind, **settings)}


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return asdict(options["decoding"]) if "decoding" in options else dict(options)


def _records(output: Path | None, settings: dict[str, Any], resume: bool) -> "RecordFile | nullcontext[None]":
    from mlx_adapters.evaluate.records import RecordFile

    return nullcontext() if output is None else RecordFile(output, settings, resume=resume)


def _digest(adapter: Path | None) -> str | None:
    """Which adapter it was, should the folder be written again between two runs."""
    import hashlib

    if adapter is None:
        return None
    file = adapter / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _meta(folder: Path | None) -> "AdapterMeta | None":
    from mlx_adapters import adapter

    return adapter.read_meta(folder) if folder is not None else None  # a wrong folder is told before all else


def _processes(model: Path, items: int) -> int:
    from mlx_adapters.evaluate.workers import processes_for

    count = processes_for(model, items)
    if count > 1:
        say(f"{count} processes answer, each with its own model; --processes 1 takes less memory")
    return count


@contextmanager
def _answering(model: Path, folder: Path | None, processes: int) -> "Iterator[LanguageModel | Workers]":
    """The model with its adapter, here or in as many processes."""
    from mlx_adapters import adapter
    from mlx_adapters.evaluate.workers import Workers
    from mlx_adapters.models import load as models

    if processes > 1:
        with Workers(model, folder, processes) as workers:
            yield workers
        return
    loaded = models.load(model, answering=True)
    if folder is not None:
        adapter.load(loaded, folder)
    yield loaded


def _template(trained: str, wish: str | None, force: bool) -> str:
    from mlx_adapters.data.templates import TEMPLATES, chosen_template

    if wish is not None and wish not in TEMPLATES:
        raise ConfigError(unknown("template", wish, TEMPLATES))
    if trained and wish and wish != trained and not force:
        raise ConfigError(
            f"the adapter was trained with the template {trained}, not {wish}. "
            "Leave --template (or --protocol) out, or add --force-template"
        )
    return chosen_template(wish, trained)
