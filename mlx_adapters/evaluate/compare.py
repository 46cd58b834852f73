"""Is one adapter better than another? Decided on the same items, which is far sharper than two intervals.

Only the items that one gets right and the other wrong tell anything. If both were equally good, each of
these n would fall to either side like a coin. McNemar's exact test (1947, doi.org/10.1007/BF02295996) is the
chance that n coins fall at least as unevenly as they did: p = 2 sum_{i<=k} C(n, i) / 2^n, k the smaller side.
The difference in accuracy has the interval of Bonett and Price (2012, doi.org/10.3102/1076998611411915).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_adapters.errors import DataError, counted
from mlx_adapters.evaluate.score import Z95, Record

__all__ = ["Comparison", "compare", "mcnemar", "words"]


@dataclass(frozen=True)
class Comparison:
    """Two evaluations on the same `total` items of `task`: how many each got right, how many it alone did.

    `difference` is a's accuracy less b's, `low` and `high` its 95 % interval, `p` of McNemar's exact test.
    """

    task: str
    total: int
    a_correct: int
    b_correct: int
    only_a: int
    only_b: int
    difference: float
    low: float
    high: float
    p: float


def compare(a: Sequence[Record], b: Sequence[Record]) -> list[Comparison]:
    """Compare task by task, and over all items when there are several tasks (task "all").

    Raises DataError unless both have the same items.
    """
    ours, theirs = _by_task(a, "first"), _by_task(b, "second")
    if ours.keys() != theirs.keys():
        raise DataError(
            f"the reports are of different tasks: {', '.join(sorted(ours))}; {', '.join(sorted(theirs))}"
        )
    verdicts = {task: _paired(task, ours[task], theirs[task]) for task in ours}
    found = [_comparison(task, pairs) for task, pairs in verdicts.items()]
    if len(found) > 1:
        found.append(_comparison("all", [pair for pairs in verdicts.values() for pair in pairs]))
    return found


def mcnemar(only_a: int, only_b: int) -> float:
    """The two-sided p of McNemar's exact test."""
    n, k = only_a + only_b, min(only_a, only_b)
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(math.exp(one - n * math.log(2)) for one in logs))


def words(found: Comparison, a: str, b: str, *, tests: int = 1) -> str:
    """The comparison as a sentence or two. With several `tests` the 5 % are shared among them."""
    shares = f"{a} {found.a_correct / found.total:.1%}, {b} {found.b_correct / found.total:.1%}"
    text = f"{found.task}: {shares} on the same {counted(found.total, 'item')}."
    n = found.only_a + found.only_b
    if n == 0:
        return f"{text} They are right and wrong on the same ones: no difference at all."
    text += (
        f" They differ on {n}: {a} alone is right on {found.only_a}, {b} alone on {found.only_b}. "
        f"The difference is {found.difference:+.1%} (95 % interval {found.low:+.1%} to {found.high:+.1%}). "
        f"If both were equally good, a split at least this uneven would come up with p = {_p(found.p)}: "
    )
    if found.p >= 0.05 / tests:
        return text + "no evidence that one is better."
    return text + f"{a if found.only_a > found.only_b else b} is better."


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def _by_task(records: Sequence[Record], which: str) -> dict[str, dict[int, Record]]:
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        if record.index in found.setdefault(record.task, {}):
            raise DataError(f"the {which} report has item {record.index} of {record.task} twice")
        found[record.task][record.index] = record
    return found


def _paired(task: str, a: dict[int, Record], b: dict[int, Record]) -> list[tuple[bool, bool]]:
    if odd := sorted(a.keys() ^ b.keys()):
        raise DataError(
            f"{task}: one report has {counted(len(a), 'item')}, the other {len(b)}; {len(odd)} in one only "
            f"(e.g. item {odd[0]}). Only answers to the same items can be compared: use the same --limit and "
            "--seed, and let both runs finish"
        )
    for index in a:
        if (a[index].item, a[index].label) != (b[index].item, b[index].label):
            raise DataError(
                f"{task}: item {index} is another question in the two reports. Only answers to the same "
                "items can be compared: use the same data, --limit and --seed"
            )
    return [(a[index].correct, b[index].correct) for index in sorted(a)]


def _comparison(task: str, pairs: list[tuple[bool, bool]]) -> Comparison:
    total = len(pairs)
    only_a, only_b = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    # Bonett and Price: one imagined item more on each side keeps the interval honest for few items
    x, y, n = (only_a + 1) / (total + 2), (only_b + 1) / (total + 2), total + 2
    half = Z95 * math.sqrt((x + y - (x - y) ** 2) / n)
    return Comparison(
        task=task,
        total=total,
        a_correct=sum(x for x, _ in pairs),
        b_correct=sum(y for _, y in pairs),
        only_a=only_a,
        only_b=only_b,
        difference=(only_a - only_b) / total,
        low=max(-1.0, x - y - half),
        high=min(1.0, x - y + half),
        p=mcnemar(only_a, only_b),
    )
