"""What an evaluation finds: a record for each item, and the score of a set with its intervals."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlx_adapters.errors import DataError

__all__ = ["Record", "Score", "none_right", "summarise", "table", "wilson"]

Z95 = 1.959964


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
        where = "its only response" if score.total == 1 else f"any of its {score.total} responses"
        text = f"{score.task}: no answer could be read in {where}{other}"
    else:
        unread = f", {score.unanswered} because none could be read" if score.unanswered else ""
        wrong = "its only answer is" if score.total == 1 else f"all of its {score.total} answers are"
        text = f"{score.task}: {wrong} wrong{unread}{other}"
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


def table(
    scores: Sequence[Score], decoding: str = "greedy", reading: str = "strict"
) -> tuple[list[str], list[list[str]]]:
    """(heads, cells) of a table of scores: without what is in the training data where nothing is, and with a
    last row of the mean accuracy where there are several tasks."""
    second = "strict reading" if reading == "paper" else "paper's rule"
    heads = {"task": "task", "accuracy": "accuracy", "interval": "95 % interval", "correct": "correct"}
    if any(score.seen_total for score in scores):
        heads["seen"] = "seen in training"
    if any(score.near_total for score in scores):
        heads["near"] = "near"
    if "seen" in heads or "near" in heads:
        heads["unseen"] = "unseen"
    if any(_second(score, reading) is not None for score in scores):
        heads["second"] = "per character" if decoding == "likelihood" else second
    rows = [_cells(score, reading) for score in scores]
    if len(scores) > 1:
        rows.append(
            {"task": "mean", "accuracy": f"{sum(score.accuracy for score in scores) / len(scores):.1%}"}
        )
    return [*heads.values()], [[row.get(name, "") for name in heads] for row in rows]


def _cells(score: Score, reading: str) -> dict[str, str]:
    def part(correct: int, total: int) -> str:
        return f"{correct / total:.1%} of {total}" if total else "none"

    unseen = part(score.unseen_correct, score.unseen_total)
    if 0 < score.unseen_total < score.total:  # its own interval where some items were seen
        unseen += f" ({score.unseen_low:.1%} - {score.unseen_high:.1%})"
    second = _second(score, reading)
    return {
        "task": score.task,
        "accuracy": f"{score.accuracy:.1%}",
        "interval": f"{score.low:.1%} - {score.high:.1%}",
        "correct": f"{score.correct}/{score.total}",
        "seen": part(score.seen_correct, score.seen_total),
        "near": part(score.near_correct, score.near_total),
        "unseen": unseen,
        "second": f"{second:.1%}" if second is not None else "",
    }


def _second(score: Score, reading: str) -> float | None:
    """The accuracy by the other reading, or by the likelihood per character."""
    if score.norm_accuracy is not None:
        return score.norm_accuracy
    return score.strict_accuracy if reading == "paper" else score.paper_accuracy
