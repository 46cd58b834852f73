"""Is one adapter better than another? Decided on the same items, which is far sharper than two intervals.

Only the items that one gets right and the other wrong tell anything. If both were equally good, each of
these n would fall to either side like a coin. McNemar's exact test (1947, doi.org/10.1007/BF02295996) is the
chance that n coins fall at least as unevenly as they did: p = 2 sum_{i<=k} C(n, i) / 2^n, k the smaller side.
The difference in accuracy has the interval of Bonett and Price (2012, doi.org/10.3102/1076998611411915).

Where training data of either stood among the items, the unseen ones are compared by themselves too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mlx_adapters.errors import DataError, counted
from mlx_adapters.evaluate.records import read_report
from mlx_adapters.evaluate.score import Z95, Record

if TYPE_CHECKING:
    from mlx_adapters.evaluate.run import Evaluation

__all__ = ["Comparison", "compare", "differ", "mcnemar", "sentences", "words"]

Report: TypeAlias = "str | Path | Evaluation | Sequence[Record]"
"""An evaluation: the file of its report, what `evaluate` returned, or its records."""

Pair = tuple[bool, bool, bool]  # for an item: a is right, b is right, unseen by both


@dataclass(frozen=True)
class Comparison:
    """Two evaluations on the same items.

    Attributes:
        task: the test set, or `all` of several sets.
        part: `all`, or `unseen`: the items neither seen nor near in the training of either.
        total: the number of items.
        seen: how many of them were seen or near.
        a_correct, b_correct: how many each got right.
        only_a, only_b: how many it alone got right.
        difference: a's accuracy minus b's, from -1 to 1.
        low, high: the 95 % interval of the difference.
        p: that of McNemar's exact test.
    """

    task: str
    part: str
    total: int
    seen: int
    a_correct: int
    b_correct: int
    only_a: int
    only_b: int
    difference: float
    low: float
    high: float
    p: float


def compare(a: "Report", b: "Report") -> list[Comparison]:
    """Is one of two evaluations better? Compares test set by test set, and over all items when there are
    several sets (task "all"). A set with seen items is followed by its unseen part.

        (found,) = compare("base.json", "desk.json")

    Args:
        a: the file of a report, what `evaluate` returned, or its records.
        b: another evaluation of the same items.

    Returns:
        One comparison per test set, each with its unseen part where only a part was seen, and the pooled one.

    Raises:
        DataError: a file that is not a report, or evaluations of different items.
    """
    ours, theirs = _by_task(_records(a), "first"), _by_task(_records(b), "second")
    if ours.keys() != theirs.keys():
        raise DataError(
            f"the reports are of different tasks: {', '.join(sorted(ours))}; {', '.join(sorted(theirs))}"
        )
    verdicts = {task: _paired(task, ours[task], theirs[task]) for task in ours}
    if len(verdicts) > 1:
        verdicts["all"] = [pair for pairs in verdicts.values() for pair in pairs]
    found = []
    for task, pairs in verdicts.items():
        unseen = [pair for pair in pairs if pair[2]]
        found.append(_comparison(task, "all", pairs))
        if 0 < len(unseen) < len(pairs):
            found.append(_comparison(task, "unseen", unseen))
    return found


_ASKED = ("model", "template", "decoding", "reading")  # how a report says the items were asked and read


def differ(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: both values} of what two reports differ in besides the adapter, so that it is compared too."""
    found = {name: (a.get(name), b.get(name)) for name in _ASKED}
    one, other = a.get("settings") or {}, b.get("settings") or {}
    # what only one kind of decoding has, the kind tells
    found |= {name: (one[name], other[name]) for name in one if name in other and name != "kind"}
    return {name: (x, y) for name, (x, y) in found.items() if x != y}


def mcnemar(only_a: int, only_b: int) -> float:
    """The two-sided p of McNemar's exact test."""
    n, k = only_a + only_b, min(only_a, only_b)
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(math.exp(one - n * math.log(2)) for one in logs))


def words(found: Comparison, a: str, b: str, *, tests: int = 1) -> str:
    """The comparison as a sentence or two. With several `tests` the 5 % are shared among them."""
    shares = f"{a} {found.a_correct / found.total:.1%}, {b} {found.b_correct / found.total:.1%}"
    name = found.task if found.part == "all" else f"{found.task}, unseen in training"
    text = f"{name}: {shares} on the same {counted(found.total, 'item')}."
    if found.seen == found.total:
        text += " Every one was seen in training, or is near to what was: this tells what was memorised."
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


def sentences(
    found: Sequence[Comparison], a: str, b: str, others: Mapping[str, tuple[Any, Any]]
) -> list[str]:
    """The comparisons in words, after what else the reports `differ` in."""
    lines = []
    tests = sum(one.task != "all" and one.part == "all" for one in found)  # the pooled one is not counted
    if others:
        told = {
            name: ["not recorded" if x is None else str(x) for x in pair] for name, pair in others.items()
        }
        listed = ", ".join(f"{name} ({'; '.join(pair)})" for name, pair in told.items())
        lines.append(f"The reports differ in {listed}: the tests compare these together with the adapters.")
    lines += [words(one, a, b, tests=1 if one.task == "all" else tests) for one in found]
    if tests > 1:
        lines.append(f"With {tests} sets compared, p counts as small below {0.05 / tests:.2g} in each.")
    return lines


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def _records(report: "Report") -> Sequence[Record]:
    if isinstance(report, (str, Path)):
        return read_report(Path(report))[1]
    return report if isinstance(report, (list, tuple)) else report.records  # type: ignore[union-attr]


def _by_task(records: Sequence[Record], which: str) -> dict[str, dict[int, Record]]:
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        if record.index in found.setdefault(record.task, {}):
            raise DataError(f"the {which} report has item {record.index} of {record.task} twice")
        found[record.task][record.index] = record
    return found


def _paired(task: str, a: dict[int, Record], b: dict[int, Record]) -> list[Pair]:
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
    pairs = ((a[index], b[index]) for index in sorted(a))
    return [(x.correct, y.correct, not (x.seen or x.near or y.seen or y.near)) for x, y in pairs]


def _comparison(task: str, part: str, pairs: list[Pair]) -> Comparison:
    total = len(pairs)
    only_a, only_b = sum(x and not y for x, y, _ in pairs), sum(y and not x for x, y, _ in pairs)
    # Bonett and Price: one imagined item more on each side keeps the interval honest for few items
    x, y, n = (only_a + 1) / (total + 2), (only_b + 1) / (total + 2), total + 2
    half = Z95 * math.sqrt((x + y - (x - y) ** 2) / n)
    return Comparison(
        task=task,
        part=part,
        total=total,
        seen=sum(not unseen for _, _, unseen in pairs),
        a_correct=sum(x for x, _, _ in pairs),
        b_correct=sum(y for _, y, _ in pairs),
        only_a=only_a,
        only_b=only_b,
        difference=(only_a - only_b) / total,
        low=max(-1.0, x - y - half),
        high=min(1.0, x - y + half),
        p=mcnemar(only_a, only_b),
    )
