"""Kinds of answers, and the labels and texts of the choices that an instruction offers.

"Please choose ...: QUESTION\\n\\nAnswer1: TEXT Answer2: TEXT\\n\\nAnswer format: answer1/answer2"
"QUESTION Answer Choices: (A) TEXT (B) TEXT"
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from mlx_adapters.data.overlap import ANSWER_FORM, ASK

__all__ = ["KINDS", "WORDS", "Choices", "Kind", "parse"]

Kind = Literal["number", "letter", "true/false", "solution", "answer", "ending", "option"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WORDS: dict[str, tuple[str, ...]] = {
    "true/false": ("true", "false"),
    "solution": ("solution1", "solution2"),
    "answer": tuple(f"answer{number}" for number in range(1, 6)),
    "ending": tuple(f"ending{number}" for number in range(1, 5)),
    "option": ("option1", "option2"),
}

_LETTERED = "Answer Choices:"


@dataclass(frozen=True)
class Choices:
    """The bare question, and the text of each choice by its label."""

    question: str
    texts: dict[str, str]


def parse(instruction: str, kind: Kind) -> Choices | None:
    """The choices of an instruction; None when it offers none in a known form."""
    if kind == "true/false":
        return Choices(_question(ANSWER_FORM.sub("", instruction)), {label: label for label in WORDS[kind]})
    if kind == "letter":
        head, found, tail = instruction.partition(_LETTERED)
        texts = _split(" " + tail, {letter: f"({letter}) " for letter in "ABCDE"}) if found else {}
        question = head.strip()
    elif kind in WORDS:
        text = ANSWER_FORM.sub("", instruction)
        marks = {label: f"{label.capitalize()}: " for label in WORDS[kind]}
        texts = _split(text, marks)
        start = re.search(rf"\s{next(iter(marks.values()))}", text)
        question = _question(text[: start.start()]) if start else ""
    else:
        return None
    return Choices(question, texts) if len(texts) > 1 else None


def _split(text: str, marks: dict[str, str]) -> dict[str, str]:
    """The texts between the marks, which follow each other in order."""
    starts: list[tuple[str, int, int]] = []
    for label, mark in marks.items():
        found = re.compile(rf"\s{re.escape(mark)}").search(text, starts[-1][2] - 1 if starts else 0)
        if found is None:
            break
        starts.append((label, found.start(), found.end()))
    ends = [start for _, start, _ in starts[1:]] + [len(text)]
    return {label: text[begin:end].strip() for (label, _, begin), end in zip(starts, ends)}


def _question(text: str) -> str:
    return ASK.sub("", text, count=1).strip()
