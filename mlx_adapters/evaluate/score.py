"""Run a test set through a model and count: with an interval, and apart for items seen in training."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.nn as nn

from mlx_adapters.data.overlap import item_hash, relation, row_text
from mlx_adapters.data.templates import prompt_for
from mlx_adapters.data.tokens import prompt_ids
from mlx_adapters.errors import ConfigError, DataError
from mlx_adapters.evaluate.answers import EXTRACTIONS, Extraction, correct, extract
from mlx_adapters.evaluate.choices import Choices, as_label, parse
from mlx_adapters.evaluate.tasks import Item, Task, find
from mlx_adapters.generate.decode import GREEDY, Decoding, generate
from mlx_adapters.generate.likelihood import choice_ids, loglikelihoods, pick

__all__ = [
    "SCORED",
    "Record",
    "Score",
    "answered",
    "evaluate",
    "evaluate_likelihood",
    "none_right",
    "summarise",
    "wilson",
]

Z95 = 1.959964
SCORED = ("label", "text")


@dataclass(frozen=True)
class Record:
    """One answered item.

    `strict_*` is the strict reading, `paper_*` the paper's rule, and `extracted` and `correct` the one of the
    two that counts. Of a likelihood they are the likeliest choice, `norm_*` the likeliest per character, and
    `response` is empty. `item` is the hash of the question; `seen` and `near` tell its relation to the
    adapter's training data.
    """

    task: str
    index: int
    item: str
    prompt: str
    response: str
    extracted: str | None
    label: str
    correct: bool
    strict_extracted: str | None = None
    strict_correct: bool | None = None
    paper_extracted: str | None = None
    paper_correct: bool | None = None
    norm_extracted: str | None = None
    norm_correct: bool | None = None
    loglikelihoods: dict[str, float] | None = None
    seen: bool = False
    near: bool = False


@dataclass(frozen=True)
class Score:
    """A task's result. `low` and `high` bound the accuracy (Wilson, 95 %); accuracies are shares of one.

    `strict_*` and `paper_*` are None for likelihoods, `norm_*` for answers. `unseen` items are neither seen
    nor near. `unanswered` are those in whose response no answer could be read.
    """

    task: str
    correct: int
    total: int
    accuracy: float
    stderr: float
    low: float
    high: float
    strict_correct: int | None
    strict_accuracy: float | None
    paper_correct: int | None
    paper_accuracy: float | None
    norm_correct: int | None
    norm_accuracy: float | None
    seen_total: int
    seen_correct: int
    near_total: int
    near_correct: int
    unseen_total: int
    unseen_correct: int
    unseen_low: float
    unseen_high: float
    unanswered: int


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    task: Task | str,
    *,
    template: str,
    batch_size: int | None = None,
    max_tokens: int = 256,
    seen: frozenset[str] = frozenset(),
    decoding: Decoding = GREEDY,
    reading: Extraction = "strict",
    done: frozenset[int] = frozenset(),
) -> Iterator[Record]:
    """Yield a record for each item as its answer is done, not in the items' order.

    `reading` decides which verdict counts. `seen` holds what the adapter remembers of its training rows
    (`seen_hashes`); items among them are marked. Items whose index is in `done` are left out.
    """
    task = find(task) if isinstance(task, str) else task
    items = _labelled(items, task)
    left = [index for index in range(len(items)) if index not in done]
    prompts = {index: _prompt(items[index], template, tokenizer) for index in left}
    answers = generate(
        model,
        tokenizer,
        [prompt_ids(prompts[index], tokenizer) for index in left],
        max_tokens=max_tokens,
        batch_size=batch_size,
        decoding=decoding,
        keys=left,
    )
    for place, response in answers:
        index = left[place]
        item = items[index]
        found = {how: extract(response, task.kind, how=how, question=item.instruction) for how in EXTRACTIONS}
        right = {how: correct(task.kind, found[how], item.label) for how in EXTRACTIONS}
        yield replace(
            _blank(task, index, item, prompts[index], seen),
            response=response,
            extracted=found[reading],
            correct=right[reading],
            strict_extracted=found["strict"],
            strict_correct=right["strict"],
            paper_extracted=found["paper"],
            paper_correct=right["paper"],
        )


def evaluate_likelihood(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    task: Task | str,
    *,
    template: str,
    scored: str = "label",
    batch_size: int | None = None,
    seen: frozenset[str] = frozenset(),
    done: frozenset[int] = frozenset(),
) -> Iterator[Record]:
    """Score the choices of each item by their likelihood; otherwise as `evaluate`.

    `scored` is `label`: the prompt is the usual one and the choices are what the paper trains,
    "the correct answer is answer1", or "The answer is (A)."; or `text`: lm-evaluation-harness' cloze, the
    text of each choice after "Question: ...\\nAnswer:", whatever the template.
    """
    task = find(task) if isinstance(task, str) else task
    items = _labelled(items, task)
    left = [index for index in range(len(items)) if index not in done]
    choices = {index: _choices(task, items[index], index) for index in left}
    prompts, encoded = [], []
    for index in left:
        if scored == "text":
            prompt = f"Question: {choices[index].question}\nAnswer:"
            cut = [choice_ids(prompt, f" {text}", tokenizer) for text in choices[index].texts.values()]
            encoded.append((cut[0][0], [ids for _, ids in cut]))
        else:
            prompt = _prompt(items[index], template, tokenizer)
            says = "The answer is ({})." if task.kind == "letter" else "the correct answer is {}"
            ids = [
                tokenizer.encode(says.format(label), add_special_tokens=False)
                for label in choices[index].texts
            ]
            encoded.append((prompt_ids(prompt, tokenizer), ids))
        prompts.append(prompt)
    for place, scores in loglikelihoods(model, encoded, batch_size=batch_size):
        index = left[place]
        texts = choices[index].texts
        labels = list(texts)
        said = list(texts.values()) if scored == "text" else labels
        likeliest, norm = (labels[i] for i in pick(scores, [max(len(text), 1) for text in said]))
        yield replace(
            _blank(task, index, items[index], prompts[place], seen),
            extracted=likeliest,
            correct=likeliest == items[index].label,
            norm_extracted=norm,
            norm_correct=norm == items[index].label,
            loglikelihoods=dict(zip(labels, scores)),
        )


def answered(
    model: nn.Module, tokenizer: Any, items: Sequence[Item], task: Task | str, **options: Any
) -> Iterator[Record]:
    """`evaluate`, or `evaluate_likelihood` where `scored` is among the options."""
    run = evaluate_likelihood if "scored" in options else evaluate
    return run(model, tokenizer, items, task, **options)


def _labelled(items: Sequence[Item], task: Task) -> list[Item]:
    """The items with labels as readings are: those of a file are already, those made by hand may not be."""
    found = []
    for index, item in enumerate(items):
        label = as_label(item.label, task.kind)
        if label is None:
            raise DataError(f"{task.name}: item {index}: {item.label!r} is no answer of the kind {task.kind}")
        found.append(replace(item, label=label))
    return found


def _prompt(item: Item, template: str, tokenizer: Any) -> str:
    return prompt_for(item.instruction, item.input, template=template, tokenizer=tokenizer, phase="eval")


def _choices(task: Task, item: Item, index: int) -> Choices:
    choices = parse(item.instruction, task.kind)
    if choices is None:
        if task.kind == "number":
            raise ConfigError(f"{task.name}: its answers are numbers, so there are no choices to score")
        raise DataError(
            f"{task.name}: item {index}: its instruction lists no choices of the kind {task.kind}"
        )
    return choices


def _blank(task: Task, index: int, item: Item, prompt: str, seen: frozenset[str]) -> Record:
    text = row_text({"instruction": item.instruction, "input": item.input}, "instruction")
    known = relation(seen, text)
    return Record(
        task=task.name,
        index=index,
        item=item_hash(text),
        prompt=prompt,
        response="",
        extracted=None,
        label=item.label,
        correct=False,
        seen=known == "seen",
        near=known == "near",
    )


def summarise(records: Iterable[Record]) -> Score:
    """Count the records of one task; DataError when there are none or they mix tasks."""
    rows = list(records)
    tasks = {row.task for row in rows}
    if len(tasks) != 1:
        raise DataError(f"a score needs the records of one task, found {sorted(tasks) or 'none'}")
    total, right = len(rows), sum(row.correct for row in rows)
    seen = [row.correct for row in rows if row.seen]
    near = [row.correct for row in rows if row.near]
    strict = _count([row.strict_correct for row in rows])
    paper = _count([row.paper_correct for row in rows])
    norm = _count([row.norm_correct for row in rows])
    accuracy = right / total
    low, high = wilson(right, total)
    unseen_total, unseen_correct = total - len(seen) - len(near), right - sum(seen) - sum(near)
    unseen_low, unseen_high = wilson(unseen_correct, unseen_total)
    return Score(
        task=tasks.pop(),
        correct=right,
        total=total,
        accuracy=accuracy,
        stderr=math.sqrt(accuracy * (1 - accuracy) / total),
        low=low,
        high=high,
        strict_correct=strict,
        strict_accuracy=None if strict is None else strict / total,
        paper_correct=paper,
        paper_accuracy=None if paper is None else paper / total,
        norm_correct=norm,
        norm_accuracy=None if norm is None else norm / total,
        seen_total=len(seen),
        seen_correct=sum(seen),
        near_total=len(near),
        near_correct=sum(near),
        unseen_total=unseen_total,
        unseen_correct=unseen_correct,
        unseen_low=unseen_low,
        unseen_high=unseen_high,
        unanswered=sum(row.extracted is None for row in rows),
    )


def none_right(score: Score) -> str | None:
    """One line for a set of which no answer is right: more often a fault of format than of knowledge."""
    if score.correct:
        return None
    others = {"the strict reading": score.strict_correct, "the paper's rule": score.paper_correct}
    other = next((f"; {count} by {name}" for name, count in others.items() if count), "")
    if score.unanswered == score.total:
        text = f"{score.task}: no answer could be read in any of its {score.total} responses{other}"
    else:
        unread = f", {score.unanswered} because none could be read" if score.unanswered else ""
        text = f"{score.task}: all of its {score.total} answers are wrong{unread}{other}"
    return f"{text}. Look at the responses before you believe it: --output keeps them"


def _count(verdicts: list[bool | None]) -> int | None:
    return None if None in verdicts else sum(verdict is True for verdict in verdicts)


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share: sensible also near 0 and 1, and for few items."""
    if total == 0:
        return 0.0, 1.0
    share, square = right / total, Z95 * Z95
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = Z95 * math.sqrt(share * (1 - share) / total + square / (4 * total * total)) / (1 + square / total)
    return max(0.0, centre - half), min(1.0, centre + half)
