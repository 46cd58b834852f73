"""Was this test item in the training data? Told by hashes, so an adapter can remember it without the text.

An item is *seen* when its question has the same letters and digits, case folded, as a training row's. It is
*near* when it is not seen but shares 13 words in a row with one (the measure of the GPT-3 paper, Brown et al.
2020, https://arxiv.org/abs/2005.14165, appendix C).

The adapter's `seen.txt` holds both kinds, one a line: 16 hexadecimal digits for a question, `g` and 15 for 13
words. Words that more than 10 different questions share are the task's phrases and are left out; so are the
paper's own ("Please choose the correct answer to the question:"). At most 200 000 word hashes are kept, those
of the smallest value, which is a fair sample of all: of a large training set fewer near items are found. Of
more than 500 000 questions as many are kept in the same way, so that the file stays below 13 MB; then some of
the seen items are missing too, and `sampled` says so.
"""

import hashlib
import heapq
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from mlx_adapters.data.sources import Rows

__all__ = [
    "ANSWER_FORM",
    "ASK",
    "Overlap",
    "Seen",
    "gram_hashes",
    "item_hash",
    "overlap",
    "questions",
    "relation",
    "row_text",
    "rows_texts",
    "seen_hashes",
]

WORDS = 13
COMMON = 10
KEPT = 200_000
QUESTIONS = 500_000
ASK = re.compile(r"Please (?:choose|answer) .*?(?:question|sentence): ", re.DOTALL)
ANSWER_FORM = re.compile(r"\s+Answer format: [\w/]+\s*$")


def item_hash(text: str) -> str:
    """16 hexadecimal digits of the letters and digits of `text`, case folded; the rest does not count."""
    return _hash("".join(filter(str.isalnum, text.casefold())))


def gram_hashes(text: str) -> set[str]:
    """The hashes of every 13 words in a row of `text`, without the paper's phrases around a question."""
    bare = ANSWER_FORM.sub("", ASK.sub("", text, count=1))
    words = re.findall(r"[^\W_]+", bare.casefold())
    return {"g" + _hash(" ".join(words[i : i + WORDS]))[:15] for i in range(len(words) - WORDS + 1)}


def row_text(row: dict[str, Any], fmt: str) -> str:
    """The part of a row that makes it the same item: the question, not the answer."""
    if fmt == "instruction":
        return f"{row['instruction']}{row.get('input') or ''}"
    if fmt == "completion":
        return str(row["prompt"])
    if fmt == "messages":
        return "".join(str(turn.get("content", "")) for turn in row["messages"] if turn["role"] == "user")
    return str(row["text"])


class Seen:
    """Collects what an adapter remembers of the questions it was trained on, in bounded memory.

    Hashes are numbers here. Those above a bound are no longer looked at; it is lowered whenever there are too
    many. So every hash that is kept was counted from its first occurrence on.
    """

    def __init__(self) -> None:
        self._items: set[int] = set()
        self._grams: dict[int, int] = {}
        self._below, self._grams_below = 1 << 64, 1 << 60
        self._most = 4 * KEPT  # word hashes before it is looked whether some can go

    def add(self, text: str) -> None:
        """Take one more question."""
        item = int(item_hash(text), 16)
        if item >= self._below or item in self._items:
            return
        self._items.add(item)
        for entry in gram_hashes(text):
            if (gram := int(entry[1:], 16)) < self._grams_below:
                self._grams[gram] = self._grams.get(gram, 0) + 1
        if len(self._items) > 1.5 * QUESTIONS:
            self._below = heapq.nsmallest(QUESTIONS, self._items)[-1] + 1
            self._items = {item for item in self._items if item < self._below}
        if len(self._grams) > self._most:
            self._drop_grams()

    def hashes(self) -> list[str]:
        """The entries of `seen.txt`, sorted."""
        items = (f"{item:016x}" for item in heapq.nsmallest(QUESTIONS, self._items))
        return sorted([*items, *(f"g{gram:015x}" for gram in heapq.nsmallest(KEPT, self._rare()))])

    def _drop_grams(self) -> None:
        """Keep twice as many rare ones as are needed: of these some will prove to be phrases. Where there are
        hardly any, eight times as many of all, so that a set of phrases only is bounded too."""
        rare, count = self._rare(), 2 * KEPT
        if len(rare) <= count:
            rare, count = list(self._grams), 8 * KEPT
        if len(rare) > count:
            self._grams_below = heapq.nsmallest(count, rare)[-1] + 1
            self._grams = {gram: n for gram, n in self._grams.items() if gram < self._grams_below}
        self._most = max(4 * KEPT, len(self._grams) * 3 // 2)

    def _rare(self) -> list[int]:
        return [gram for gram, times in self._grams.items() if times <= COMMON]


def seen_hashes(texts: Iterable[str]) -> list[str]:
    """What an adapter remembers of the questions it was trained on, sorted."""
    seen = Seen()
    for text in texts:
        seen.add(text)
    return seen.hashes()


def questions(seen: Collection[str]) -> int:
    """How many questions a list of `seen_hashes` stands for."""
    return sum(not entry.startswith("g") for entry in seen)


@dataclass(frozen=True)
class Overlap:
    """Of `total` test items, the indices of those seen and near. `sampled`: some may be missing."""

    total: int
    seen: list[int]
    near: list[int]
    sampled: bool


def overlap(seen: Collection[str], texts: Iterable[str]) -> Overlap:
    """Compare the questions of a test set with what `seen_hashes` remembers of a training set."""
    known = frozenset(seen)
    found: dict[str, list[int]] = {"seen": [], "near": [], "new": []}
    total = 0
    for index, text in enumerate(texts):
        total += 1
        found[relation(known, text)].append(index)
    items = questions(known)
    return Overlap(total, found["seen"], found["near"], items >= QUESTIONS or len(known) - items >= KEPT)


def relation(seen: frozenset[str], text: str) -> str:
    """`seen`, `near` or `new`."""
    if item_hash(text) in seen:
        return "seen"
    return "near" if seen and not seen.isdisjoint(gram_hashes(text)) else "new"


def rows_texts(rows: Rows) -> list[str]:
    """The questions of training rows."""
    return [row_text(row, rows.format) for row in rows.rows]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
