"""Kinds of answers, and the labels and texts of the choices that an instruction offers.

"Please choose ...: QUESTION\\n\\nAnswer1: TEXT Answer2: TEXT\\n\\nAnswer format: answer1/answer2"
"QUESTION Answer Choices: (A) TEXT (B) TEXT"
"QUESTION The options: A ) TEXT , B ) TEXT", or with "['A ) TEXT', 'B ) TEXT']": MathQA's
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mlx_adapters.data.overlap import ANSWER_FORM, ASK

__all__ = ["KINDS", "WORDS", "Choices", "Kind", "as_label", "parse"]

Kind = Literal["number", "letter", "true/false", "solution", "answer", "ending", "option"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WORDS: dict[str, tuple[str, ...]] = {
    "true/false": ("true", "false"),
    "solution": ("solution1", "solution2"),
    "answer": tuple(f"answer{number}" for number in range(1, 6)),
    "ending": tuple(f"ending{number}" for number in range(1, 5)),
    "option": ("option1", "option2"),
}

LETTERS = "ABCDE"
_LETTERED = "Answer Choices:"
_MATH_QA = "The options:"


@dataclass(frozen=True)
class Choices:
    """The bare question, and the text of each choice by its label."""

    question: str
    texts: dict[str, str]


def as_label(answer: Any, kind: Kind) -> str | None:
    """A right answer as the label that readings are compared with; None where it is not of that kind.

    Letters become capitals, words lower case, numbers lose the commas between thousands; outer blanks go.
    """
    text = str(answer).strip()
    if kind == "letter":
        return text.upper() if len(text) == 1 and text.upper() in LETTERS else None
    if kind != "number":
        return text.lower() if text.lower() in WORDS[kind] else None
    text = text.replace(",", "")
    try:
        fine = not isinstance(answer, bool) and math.isfinite(float(text))
    except ValueError:
        fine = False
    return text if fine else None


def parse(instruction: str, kind: Kind) -> Choices | None:
    """The choices of an instruction; None when it offers none in a known form."""
    if kind == "true/false":
        return Choices(_question(ANSWER_FORM.sub("", instruction)), {label: label for label in WORDS[kind]})
    if kind == "letter":
        head, found, tail = instruction.partition(_LETTERED)
        texts = _split(" " + tail, {letter: f"({letter}) " for letter in LETTERS}) if found else {}
        if not found:
            head, found, tail = instruction.rpartition(_MATH_QA)
            texts = _math_qa_texts(tail) if found else {}
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


def _math_qa_texts(tail: str) -> dict[str, str]:
    """The texts of MathQA's options, in lower case as they were written.

    The program that made LLM-Adapters' file capitalised every a-f of the options with their letters.
    """
    starts: list[tuple[str, int, int]] = []
    for letter in LETTERS:
        mark = re.compile(rf"(?:^|[,\[])[\s'\"]*{letter} \)")
        found = mark.search(tail, starts[-1][2] if starts else 0)
        if found is None:
            break
        starts.append((letter, found.start(), found.end()))
    ends = [start for _, start, _ in starts[1:]] + [len(tail)]
    return {letter: tail[begin:end].strip(" ,'\"[]").lower() for (letter, _, begin), end in zip(starts, ends)}


def _question(text: str) -> str:
    return ASK.sub("", text, count=1).strip()
