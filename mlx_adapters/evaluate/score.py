"""Run a test set through a model and count: with an interval, and apart for items seen in training."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mlx_adapters.data.overlap import item_hash, row_text
from mlx_adapters.data.templates import prompt_for
from mlx_adapters.data.tokens import prompt_ids
from mlx_adapters.errors import DataError
from mlx_adapters.evaluate.answers import correct, extract
from mlx_adapters.evaluate.decode import generate
from mlx_adapters.evaluate.tasks import Item, Task, find

__all__ = ["Record", "Score", "evaluate", "summarise", "wilson"]

Z95 = 1.959964


@dataclass(frozen=True)
class Record:
    """One answered item. `extracted`/`correct` are the strict reading, `paper_*` the paper's rule."""

    task: str
    index: int
    prompt: str
    response: str
    extracted: str | None
    label: str
    correct: bool
    paper_extracted: str | None
    paper_correct: bool
    seen: bool


@dataclass(frozen=True)
class Score:
    """A task's result. `low` and `high` bound the accuracy (Wilson, 95 %); accuracies are shares of one."""

    task: str
    correct: int
    total: int
    accuracy: float
    stderr: float
    low: float
    high: float
    paper_correct: int
    paper_accuracy: float
    seen_total: int
    seen_correct: int
    unseen_total: int
    unseen_correct: int
    unanswered: int


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    task: Task | str,
    *,
    template: str,
    batch_size: int = 16,
    max_tokens: int = 256,
    seen: frozenset[str] = frozenset(),
) -> Iterator[Record]:
    """Yield a record for each item as its answer is done, not in the items' order.

    `seen` holds `item_hash` of the training rows; items among them are marked.
    """
    if isinstance(task, str):
        task = find(task)
    prompts = [
        prompt_for(item.instruction, item.input, template=template, tokenizer=tokenizer, phase="eval")
        for item in items
    ]
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    for index, response in generate(model, tokenizer, ids, max_tokens=max_tokens, batch_size=batch_size):
        item = items[index]
        strict = extract(response, task.kind, question=item.instruction)
        paper = extract(response, task.kind, how="paper")
        row = {"instruction": item.instruction, "input": item.input}
        yield Record(
            task=task.name,
            index=index,
            prompt=prompts[index],
            response=response,
            extracted=strict,
            label=item.label,
            correct=correct(task.kind, strict, item.label),
            paper_extracted=paper,
            paper_correct=correct(task.kind, paper, item.label),
            seen=item_hash(row_text(row, "instruction")) in seen,
        )


def summarise(records: Iterable[Record]) -> Score:
    """Count the records of one task; DataError when there are none or they mix tasks."""
    rows = list(records)
    tasks = {row.task for row in rows}
    if len(tasks) != 1:
        raise DataError(f"a score needs the records of one task, found {sorted(tasks) or 'none'}")
    total, right = len(rows), sum(row.correct for row in rows)
    paper = sum(row.paper_correct for row in rows)
    seen = [row for row in rows if row.seen]
    seen_right = sum(row.correct for row in seen)
    accuracy = right / total
    low, high = wilson(right, total)
    return Score(
        task=tasks.pop(),
        correct=right,
        total=total,
        accuracy=accuracy,
        stderr=math.sqrt(accuracy * (1 - accuracy) / total),
        low=low,
        high=high,
        paper_correct=paper,
        paper_accuracy=paper / total,
        seen_total=len(seen),
        seen_correct=seen_right,
        unseen_total=total - len(seen),
        unseen_correct=right - seen_right,
        unanswered=sum(row.extracted is None for row in rows),
    )


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share: sensible also near 0 and 1, and for few items."""
    if total == 0:
        return 0.0, 1.0
    share, square = right / total, Z95 * Z95
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = Z95 * math.sqrt(share * (1 - share) / total + square / (4 * total * total)) / (1 + square / total)
    return max(0.0, centre - half), min(1.0, centre + half)
