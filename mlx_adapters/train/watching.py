"""What is measured while training, besides the loss: right answers in test sets, and samples to read.

Nothing here changes what is trained: answers are greedy, dropout is off, and every training step sets the
seed of its noise itself.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_adapters.adapter.call import before_text
from mlx_adapters.data.overlap import row_text
from mlx_adapters.data.sources import load_rows
from mlx_adapters.data.templates import Asked, prompt_for
from mlx_adapters.data.tokens import Example, prompt_ids
from mlx_adapters.errors import ConfigError
from mlx_adapters.evaluate import tasks as test_sets
from mlx_adapters.evaluate.ask import Asking, answer
from mlx_adapters.evaluate.tasks import Item, Task
from mlx_adapters.generate.decode import generate_ids
from mlx_adapters.models.limits import positions
from mlx_adapters.models.load import LanguageModel
from mlx_adapters.models.own_template import OWN, ChatTemplate
from mlx_adapters.train.config import NOTHING_TO_JUDGE, TrainConfig
from mlx_adapters.train.distributed import Processes
from mlx_adapters.train.progress import Sample

__all__ = ["Question", "Watch", "test_items", "watch"]

_ROWS = 16  # answers that are decoded together, beside what training keeps in memory
_TOKENS = 100  # the longest sample
_BEGINNING = 16  # tokens of a text without a prompt that a sample continues

TestSets = Sequence[tuple[Task, list[Item]]]
"""Test sets with their items."""


@dataclass(frozen=True)
class Question:
    """The prompt of a sample, as text and as tokens, and the answer of its row."""

    prompt: str
    ids: list[int]
    expected: str = ""


@dataclass
class Watch:
    """What is asked while training.

    Attributes:
        loaded: the model, on which the adapter is.
        template: the prompt template of the run.
        sets: the test sets with their items.
        asked: the prompts of the samples.
        chat: how the template `chat` writes in this run.
        processes: those of the run; they share the items.
        identity: what a run that looks for its best step has to share with the one that it resumes.
        tell: gets a few words while it takes time.
        stopped: tells whether the run has to end. What is being asked is then left for a resumed run.
    """

    loaded: LanguageModel
    template: str
    sets: TestSets = ()
    asked: Sequence[Question] = ()
    chat: ChatTemplate = OWN
    processes: Processes = field(default_factory=Processes)
    identity: dict[str, str] = field(default_factory=dict)
    tell: Callable[[str], None] = lambda words: None
    stopped: Callable[[], bool] = lambda: False

    def accuracies(self) -> dict[str, float] | None:
        """The share of right answers in each test set, decoded greedily, as `mlx-adapters eval` does; None
        where the run has to end before all are known."""
        rank, size = self.processes.rank, self.processes.size
        right = []
        for task, items in self.sets:
            others = frozenset(index for index in range(len(items)) if index % size != rank)
            count = self._right(task, items, others) if len(others) < len(items) else 0
            if count is None:
                return None
            right.append(count)
        if not right:
            return {}
        counts = self.processes.sums([mx.array(float(count)) for count in right], {})[0]
        return {
            task.name: round(float(count)) / len(items)
            for (task, items), count in zip(self.sets, counts, strict=True)
        }

    def _right(self, task: Task, items: Sequence[Item], others: frozenset[int]) -> int | None:
        asking = Asking(template=self.template, chat=self.chat, batch_size=_ROWS)
        right, own = 0, len(items) - len(others)
        answers = answer(self.loaded.model, self.loaded.tokenizer, task, items, asking, done=others)
        with closing(answers) as records:  # at once: it puts the model back into training
            for done, record in enumerate(records, start=1):
                right += record.correct
                self.tell(f"{task.name} {done}/{own}  {right / done:.0%} right")
                if self.stopped():
                    return None
        return right

    def samples(self) -> tuple[Sample, ...]:
        """Answers to the prompts, in the first process; the others have none."""
        if not self.asked or not self.processes.writes:
            return ()
        model, tokenizer = self.loaded.model, _tokenizer(self.loaded, self.template, self.chat)
        self.tell("answers to read")
        stop = frozenset(int(token) for token in tokenizer.eos_token_ids)
        prompts, limit = [one.ids for one in self.asked], positions(model)
        room = _TOKENS if limit is None else limit - before_text(model) - max(map(len, prompts))
        found = dict(
            generate_ids(model, prompts, stop=stop, max_tokens=max(1, min(_TOKENS, room)), batch_size=_ROWS)
        )
        texts = [tokenizer.decode(found[index], skip_special_tokens=True) for index in range(len(prompts))]
        return tuple(
            Sample(prompt=one.prompt, answer=text, expected=one.expected)
            for one, text in zip(self.asked, texts, strict=True)
        )


def watch(
    loaded: LanguageModel,
    config: TrainConfig,
    validation: Sequence[Example],
    sets: TestSets,
    *,
    template: str,
    chat: ChatTemplate = OWN,
    form: str,
    processes: Processes,
) -> Watch:
    """What `config` asks to watch; `sets` are its `test_items`. Raises ConfigError, DataError where it cannot
    be."""
    tokenizer = _tokenizer(loaded, template, chat)
    asked = list(_asked(tokenizer, config, validation, template=template, form=form))
    return Watch(loaded, template, sets, asked, chat, processes, _judge(config, sets, validation))


def _judge(config: TrainConfig, sets: TestSets, validation: Sequence[Example]) -> dict[str, str]:
    """What decides which step is the best, in a few letters; ConfigError where nothing does."""
    if not (config.best or config.patience):
        return {}
    if config.judged_by == "accuracy":
        judge: list[Any] = [(task.name, list(map(vars, items))) for task, items in sets]
    else:
        judge = [(example.loss_start, list(example.ids)) for example in validation]
    if not judge:
        raise ConfigError(NOTHING_TO_JUDGE)
    return {"rows that decide which step is best": hashlib.sha256(repr(judge).encode()).hexdigest()[:16]}


def test_items(config: TrainConfig) -> TestSets:
    """The test sets of `config` with the items that `mlx-adapters eval --limit` draws."""
    if not config.eval_task:
        return []
    folder = Path(config.data_dir) if config.data_dir else None
    return test_sets.load(config.eval_task, data_dir=folder, limit=config.eval_limit)


def _asked(
    tokenizer: Any, config: TrainConfig, validation: Sequence[Example], *, template: str, form: str
) -> Iterable[Question]:
    wanted = config.eval_samples
    if wanted is None:
        return
    if isinstance(wanted, str):
        for text in _prompts(Path(wanted)):
            prompt = prompt_for(text, template=template, tokenizer=tokenizer, phase="eval")
            yield Question(text, prompt_ids(prompt, tokenizer))
        return
    if not validation:
        raise ConfigError("eval_samples needs validation rows: give validation too, or a file of prompts")
    if config.loss_on == "all" and form != "text":
        raise ConfigError(
            "eval_samples: with loss_on=all rows do not tell where an answer begins. Give a file of prompts"
        )
    for example in validation[: int(wanted)]:
        start = _BEGINNING if form == "text" else example.loss_start
        end = example.unlabelled[0][0] if example.unlabelled else len(example.ids)
        prompt, expected = (_text(tokenizer, part) for part in (example.ids[:start], example.ids[start:end]))
        yield Question(prompt, list(example.ids[:start]), expected)


def _prompts(file: Path) -> list[str]:
    """The prompts in a file: each line of a .txt, or the questions of rows."""
    if file.suffix == ".txt" and file.is_file():
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        found = [line.strip() for line in lines if line.strip()]
    else:
        rows = load_rows(str(file))
        found = [row_text(row, rows.format) for row in rows.rows]
    if not found:
        raise ConfigError(f"eval_samples={file}: has no prompts")
    return found


def _tokenizer(loaded: LanguageModel, template: str, chat: ChatTemplate) -> Any:
    """The tokenizer that writes prompts, and knows where answers end, as `mlx-adapters eval` makes it."""
    return Asked(template, chat).on(loaded.tokenizer)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text
