"""Measure a model and its adapter on test sets: what `eval` computes, as functions.

    evaluate(model, "test.jsonl", adapter="desk").accuracy

`evaluate` runs to the end. Who wants to show progress iterates over the parts of an `Evaluator`, one per
test set; each yields its records as they are done.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mlx_adapters import adapter as adapters
from mlx_adapters.data.templates import Asked, asked
from mlx_adapters.errors import ConfigError, OutputError, UnsupportedError
from mlx_adapters.evaluate import tasks as test_sets
from mlx_adapters.evaluate.ask import Asking, answer
from mlx_adapters.evaluate.config import EvalConfig
from mlx_adapters.evaluate.records import RecordFile
from mlx_adapters.evaluate.score import Record, Score, summarise
from mlx_adapters.evaluate.score import table as score_table
from mlx_adapters.evaluate.tasks import Item, Task
from mlx_adapters.evaluate.workers import Workers, processes_for
from mlx_adapters.fields import parse_fields
from mlx_adapters.files.writing import write_json
from mlx_adapters.generate.decode import Decoding
from mlx_adapters.generate.using import fetched, meta_of, opened, using
from mlx_adapters.models import own_template
from mlx_adapters.models.load import LanguageModel, locate, read_config
from mlx_adapters.models.origin import remembered
from mlx_adapters.models.own_template import ChatTemplate
from mlx_adapters.notebook import table

__all__ = ["Evaluation", "Evaluator", "Part", "evaluate"]

Known = tuple[str, ChatTemplate]
"""The prompt template that something was trained with, and how it wrote chats."""
Answer = Callable[..., Iterator[Record]]
"""`answer` of a model in this process, or `Workers.answer`: (task, items, asking, done=...) -> records."""


@dataclass(frozen=True)
class Evaluation:
    """Test sets answered by a model.

    Attributes:
        settings: what was measured and how, as in the report.
        records: one per item, in the order of the items.
        scores: one per test set, with 95 % intervals.
    """

    settings: dict[str, Any]
    records: tuple[Record, ...]
    scores: tuple[Score, ...]

    @property
    def accuracy(self) -> float:
        """The share of right answers, from 0 to 1; of several sets the mean, each weighing the same."""
        return sum(score.accuracy for score in self.scores) / len(self.scores)

    def report(self) -> dict[str, Any]:
        """The report of `eval --output` as JSON values."""
        scores = [asdict(score) for score in self.scores]
        return self.settings | {"scores": scores, "records": self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        """One row per item: the fields of a `Record`."""
        return [asdict(record) for record in self.records]

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame; UnsupportedError where pandas is not installed: take `rows`."""
        try:
            pandas: Any = import_module("pandas")
        except ImportError:
            raise UnsupportedError("pandas is not installed: pip install pandas, or take rows()") from None
        return pandas.DataFrame(self.rows())

    def _repr_html_(self) -> str:
        return table(*score_table(self.scores, self.settings["decoding"], self.settings["reading"]))

    def save(self, path: str | Path) -> None:
        """Write the report, which `compare` reads. Raises OutputError where the file exists."""
        file = Path(path)
        if file.exists():
            raise OutputError(f"{file}: exists. Choose another name, or remove it")
        write_json(file, self.report())


@dataclass
class Part:
    """One test set of an evaluation. Iterating answers what is left of it and yields each record."""

    task: Task
    items: Sequence[Item]
    asking: Asking
    answer: Answer
    file: RecordFile | None = None
    done: dict[int, Record] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.file is not None:
            self.done = {record.index: record for record in self.file.done(self.task.name, self.items)}
        self.resumed = len(self.done)

    def __iter__(self) -> Iterator[Record]:
        started = time.perf_counter()
        for record in self.answer(self.task, self.items, self.asking, done=frozenset(self.done)):
            self.done[record.index] = record
            if self.file is not None:
                self.file.append(record)
            yield record
        self.seconds += time.perf_counter() - started

    def run(self) -> None:
        """Answer what is left."""
        if self.left:
            for _ in self:
                pass

    @property
    def left(self) -> int:
        """Items without an answer."""
        return len(self.items) - len(self.done)

    @property
    def records(self) -> list[Record]:
        """All records, in the items' order; those that are missing are answered first."""
        self.run()
        return [self.done[index] for index in sorted(self.done)]

    @property
    def accuracy(self) -> float:
        """The share of right answers so far."""
        return sum(record.correct for record in self.done.values()) / len(self.done)

    @property
    def rate(self) -> float:
        """Items per second, without those that an earlier run had answered."""
        return (len(self.done) - self.resumed) / self.seconds if self.seconds else 0.0


class Evaluator:
    """An evaluation: prepared when it is made, so that what is wrong is reported before the model loads, and
    run inside `with`.

        with Evaluator("qwen", "test.jsonl", adapter="desk") as evaluator:
            for part in evaluator.parts:
                for record in part:
                    ...
            evaluation = evaluator.finish()

    `processes` is how many processes answer. The arguments are those of `evaluate`.
    """

    def __init__(
        self,
        model: LanguageModel | str | Path,
        tasks: str | Path,
        config: EvalConfig | None = None,
        *,
        adapter: str | Path | None = None,
        output: str | Path | None = None,
        resume: bool = False,
        processes: int | None = 1,
    ) -> None:
        if resume and output is None:
            raise ConfigError("--resume goes on with the records of --output: give the same --output")
        config = config or EvalConfig()
        self.model, self.resume = model, resume
        self.output = None if output is None else Path(output)
        self.parts: list[Part] = []
        settled = config.settled()
        decoding = _decoding(config, settled)
        self._sets = test_sets.load(
            str(tasks),
            data_dir=Path(config.data_dir) if config.data_dir else None,
            limit=config.limit,
            seed=config.seed,
            prompt=config.prompt,
            label=config.label,
        )
        self.adapter = fetched(model, adapter)
        meta = meta_of(model, self.adapter)  # a wrong folder is reported before the model is looked for
        fused, self.processes = self._place(model, processes)
        known = ((meta.template, meta.chat), fused) if meta else (fused,)
        way = _asked(known, settled.get("template"), config)
        self.asking = Asking(
            template=way.template,
            chat=way.chat,
            decoding=decoding,
            choices=config.choices,
            reading=settled["reading"],
            batch_size=config.batch_size,
            max_tokens=config.max_tokens,
            seen=frozenset(meta.seen if meta else ()),
        )
        self.settings: dict[str, Any] = {
            "model": str(model.path if isinstance(model, LanguageModel) else model),
            "adapter": None if adapter is None else str(adapter),
            "adapter_sha256": _weights_hash(self.adapter),
            "template": self.asking.template,
            "decoding": settled["decoding"],
            "settings": self.asking.settings,
            "reading": self.asking.rules,
            "data": config.data_dir or "hub",
            "tasks": [task.name for task, _ in self._sets],
            "limit": config.limit,
            "seed": config.seed,
        }

    def _place(self, model: LanguageModel | str | Path, processes: int | None) -> tuple[Known, int]:
        """(the templates of an adapter fused into the model, how many processes answer)."""
        if isinstance(model, LanguageModel):
            if (processes or 1) > 1:
                raise ConfigError("processes load the model themselves: give its folder or hub id instead")
            return (model.template, model.chat), 1
        self._folder = locate(model)
        items = sum(len(items) for _, items in self._sets)
        count = processes_for(self._folder, items) if processes is None else processes
        about = read_config(self._folder)
        return (remembered(about).get("template", ""), own_template.fused(about)), count

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            file = None
            if self.output is not None:
                file = stack.enter_context(RecordFile(self.output, self.settings, resume=self.resume))
            if self.processes > 1:
                ask: Answer = stack.enter_context(Workers(self._folder, self.adapter, self.processes)).answer
            else:
                loaded = opened(self.model)
                stack.enter_context(using(loaded, self.adapter))
                ask = partial(answer, loaded.model, loaded.tokenizer)
            self.parts = [Part(task, items, self.asking, ask, file) for task, items in self._sets]
            self._file, self._stack = file, stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def finish(self) -> Evaluation:
        """Answer what is left and, with an `output`, write the report there."""
        scores = tuple(summarise(part.records) for part in self.parts)
        records = tuple(record for part in self.parts for record in part.records)
        found = Evaluation(self.settings, records, scores)
        if self._file is not None:
            self._file.finish(found.report())
        return found


def evaluate(
    model: LanguageModel | str | Path,
    tasks: str | Path,
    *,
    adapter: str | Path | None = None,
    template: str | None = None,
    decoding: str = "greedy",
    limit: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    processes: int | None = 1,
    **settings: Any,
) -> Evaluation:
    """Answer test sets and count what is right, apart for items that were seen in training.

    Args:
        model: a loaded model, a model folder or a hub id.
        tasks: test sets, joined by commas: names ("gsm8k,boolq"), groups ("math") or your own .json and
            .jsonl files.
        adapter: an adapter folder, a hub id, or the name of one that is loaded. None: the model as it is.
        template: the prompt template, by default the adapter's, else alpaca.
        decoding: "greedy", "beam" (four beams, as in the paper), "sample", or "likelihood" of the choices.
        limit: use that many items of each set, drawn by `seed`.
        batch_size: rows that are decoded together, by default as many as memory allows.
        max_tokens: the longest answer, by default the paper's: 256 or 32 tokens.
        output: a new JSON file for the report; the records are kept beside it while the evaluation runs.
        resume: continue the interrupted records of `output`.
        processes: share the items among processes that each load the model; None: two where that pays.
        **settings: the other fields of `EvalConfig`: data_dir, protocol, seed, prompt, label ...

    Returns: the records, the scores and `accuracy`.

    Raises:
        ConfigError: settings that are unknown or contradict each other.
        DataError: a test set that cannot be read.
        AdapterError: an adapter that does not fit the model.
        OutputError: an `output` that exists, or was made with other settings.
    """
    named = {"template": template, "decoding": decoding, "limit": limit, "batch_size": batch_size}
    config = parse_fields(EvalConfig, settings | named | {"max_tokens": max_tokens}, where="evaluate")
    with Evaluator(
        model, tasks, config, adapter=adapter, output=output, resume=resume, processes=processes
    ) as evaluator:
        return evaluator.finish()


def _decoding(config: EvalConfig, settled: dict[str, Any]) -> Decoding | None:
    kind = settled["decoding"]
    if kind == "likelihood":
        return None
    names = {"beam": (), "greedy": ()}.get(kind, ("temperature", "top_p", "top_k", "seed"))
    beams = {"beams": settled["num_beams"]} if kind == "beam" else {}
    return Decoding(kind=kind, **beams, **{name: getattr(config, name) for name in names})


def _asked(known: Sequence[Known], wanted: str | None, config: EvalConfig) -> Asked:
    """The templates of the questions: `wanted`, or those of the training."""
    found = asked(wanted, config.chat_template_kwargs, *known, fallback="alpaca")
    trained, text = next(((name, chat.text) for name, chat in known if name), ("", ""))
    asks = f"{wanted}" if found.template == "chat" and found.chat.text != text else found.template
    if trained and wanted and asks != trained and not config.force_template:
        raise ConfigError(
            f"the adapter was trained with the template {trained}, not {asks}. "
            "Leave --template (or --protocol) out, or add --force-template"
        )
    return found


def _weights_hash(adapter: str | Path | None) -> str | None:
    """Which adapter it was, should the folder be written again between two runs."""
    file = None if adapter is None else adapters.weights_file(Path(adapter))
    return hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else None
