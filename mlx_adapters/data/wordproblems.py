"""The word problems of the quickstart: generated, so the first command needs no data and no network.

Rows are `{"instruction", "input", "output", "answer"}`. The outputs show one line of working and end
"The answer is N." Training and test rows share neither a person's name nor a pair of numbers.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["generate"]

Split = Literal["train", "test"]

_NAMES = {
    "train": "Ada Ben Carla Dan Eva Finn Gina Hugo Iris Jack Kira Leo Mona Nils Olga Paul Rosa Sam Tara Will",
    "test": "Amir Bella Cyrus Dora Emil Fatma Goran Hana Igor Jana",
}
_THINGS = ["apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "stickers", "toys", "cards"]
_CONTAINERS = ["boxes", "bags", "baskets", "jars", "shelves", "drawers"]


@dataclass(frozen=True)
class _Form:
    """A question with its working. `numbers` draws (a, b, c); `solve` gives (working, answer)."""

    text: str
    low: int
    high: int
    solve: Callable[[int, int, int], tuple[str, int]]


def _add(a: int, b: int, c: int) -> tuple[str, int]:
    return f"{a} + {b} = {a + b}.", a + b


def _subtract(a: int, b: int, c: int) -> tuple[str, int]:
    return f"{a} - {b} = {a - b}.", a - b


def _multiply(a: int, b: int, c: int) -> tuple[str, int]:
    return f"{a} * {b} = {a * b}.", a * b


def _add_subtract(a: int, b: int, c: int) -> tuple[str, int]:
    return f"{a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}.", a + b - c


_FORMS = (
    _Form("{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?", 2, 30, _add),
    _Form("{n} found {a} {t} and {m} found {b}. How many {t} did they find together?", 2, 30, _add),
    _Form("There are {a} {t} on the table. {n} puts {b} more there. How many are on the table?", 2, 30, _add),
    _Form("{n} had {a} {t} and gave {b} to {m}. How many {t} are left for {n}?", 2, 30, _subtract),
    _Form("{n} has {a} {t}. {m} has {b} fewer. How many {t} does {m} have?", 2, 30, _subtract),
    _Form("Of {n}'s {a} {t}, {b} were lost. How many {t} remain?", 2, 30, _subtract),
    _Form("{n} has {a} {k} with {b} {t} in each. How many {t} are there in all?", 2, 9, _multiply),
    _Form("{n} buys {a} {t} every day for {b} days. How many {t} does {n} buy?", 2, 9, _multiply),
    _Form("{n} had {a} {t}, got {b} from {m}, then lost {c}. How many {t} has {n}?", 2, 15, _add_subtract),
    _Form("{n} picks {a} {t}, {m} picks {b}. They give away {c}. How many are left?", 2, 15, _add_subtract),
)  # fmt: skip


def generate(count: int, *, seed: int = 0, split: Split = "train") -> list[dict[str, str]]:
    """`count` different problems of a split; the same for the same arguments."""
    rng = random.Random(f"{split}:{seed}")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        row = _row(rng, split)
        rows.setdefault(row["instruction"], row)
    return list(rows.values())


def _row(rng: random.Random, split: Split) -> dict[str, str]:
    form = rng.choice(_FORMS)
    a, b = _pair(rng, form, split)
    c = rng.randint(1, a + b - 1) if form.solve is _add_subtract else 0
    n, m = rng.sample(_NAMES[split].split(), 2)
    text = form.text.format(
        n=n, m=m, a=a, b=b, c=c, t=rng.choice(_THINGS), k=rng.choice(_CONTAINERS)
    )  # fmt: skip
    working, answer = form.solve(a, b, c)
    return {
        "instruction": text,
        "input": "",
        "output": f"{working} The answer is {answer}.",
        "answer": str(answer),
    }


def _pair(rng: random.Random, form: _Form, split: Split) -> tuple[int, int]:
    """Two numbers of the split: every fifth pair, by a fixed rule, belongs to the test."""
    while True:
        a, b = rng.randint(form.low, form.high), rng.randint(form.low, form.high)
        if form.solve is _subtract and b >= a:
            continue
        if ((7 * a + b) % 5 == 0) == (split == "test"):
            return a, b
