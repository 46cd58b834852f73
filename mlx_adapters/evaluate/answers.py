"""Find the answer in a model's response, and judge it.

Two readings of a response. `strict` takes what the response states as its answer; `paper` is the rule of
LLM-Adapters, kept to compare with its tables. Numbers have one rule, the last one counts. For
letters the paper takes the first capital A-E anywhere, which also fires inside words ("All", "Because").
"""

import re
from typing import Literal

__all__ = ["EXTRACTIONS", "Extraction", "Kind", "correct", "extract"]

Kind = Literal["number", "letter"]
Extraction = Literal["strict", "paper"]
EXTRACTIONS: tuple[Extraction, ...] = ("strict", "paper")

TOLERANCE = 0.001
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]*)?")
_LETTER = re.compile(r"[A-E]")
_STATED = re.compile(
    r"(?i:\b(?:answer|choice|option)\b(?:\s+(?:choice|option))?\s*(?:is|would\s+be|must\s+be)?\s*[:=]?\s*"
    r"(?:the\s+)?(?:letter\s+|option\s+|choice\s+)?)[\"'*]*"
    r"(?:\(\s*([A-Ea-e])\s*\)|([A-E])(?![A-Za-z'\u2019])|([a-e])(?=[\"'*]*(?:[.,;)]|\s*$)))"
)
_BRACKETED = re.compile(r"\(\s*([A-E])\s*\)")
_ALONE = re.compile(r"(?<![A-Za-z0-9'\u2019])([A-E])(?![A-Za-z0-9'\u2019])(?!\s+[a-z])")
_OPTION = re.compile(r"\(\s*([A-E])\s*\)\s*(.*?)\s*(?=\(\s*[A-E]\s*\)|$)", re.DOTALL)


def extract(response: str, kind: Kind, *, how: Extraction = "strict", question: str = "") -> str | None:
    """The answer in `response`, None when there is none.

    `question` is the instruction; its "(A) .. (B) .." options let the strict reading recognise an answer
    given as the option's text.
    """
    said = response.split("### Response:")[0]  # a model that runs on writes the next item itself
    if how == "strict":
        said = said.split("### Instruction:")[0]
    if kind == "number":
        return _number(said)
    if how == "paper":
        found = _LETTER.search(said)
        return found.group() if found else None
    return _stated_letter(said) or _option_text(said, question)


def correct(kind: Kind, extracted: str | None, label: str) -> bool:
    """Whether the extracted answer is the label: numbers within 0.001, letters equal."""
    if extracted is None:
        return False
    if kind == "number":
        return abs(float(extracted) - float(label)) <= TOLERANCE
    return extracted == label.strip().upper()


def _number(response: str) -> str | None:
    """The paper's rule: drop commas, the last number counts."""
    found = _NUMBER.findall(response.replace(",", ""))
    return found[-1].rstrip(".") if found else None


def _stated_letter(response: str) -> str | None:
    """Last "answer is X"; else the last "(X)"; else the last stand-alone capital."""
    for pattern in (_STATED, _BRACKETED, _ALONE):
        found = list(pattern.finditer(response))
        if found:
            return next(group for group in found[-1].groups() if group).upper()
    return None


def _option_text(response: str, question: str) -> str | None:
    """The one option whose text stands in the last line of the response."""
    lines = response.strip().splitlines()
    if not lines:
        return None
    said = _plain(lines[-1])
    texts = {letter: _plain(text) for letter, text in _OPTION.findall(question)}
    hits = {letter: text for letter, text in texts.items() if text and f" {text} " in f" {said} "}
    # An option inside another one ("5" in "5 km") is not meant when the longer one is there.
    best = [
        a for a, text in hits.items() if not any(text != other and text in other for other in hits.values())
    ]
    return best[0] if len(best) == 1 else None


def _plain(text: str) -> str:
    """Lower case, digits' commas gone, other punctuation to spaces; signs and decimal points stay."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.casefold())
    text = re.sub(r"[^\w\-./%$]|\.(?!\d)", " ", text)
    return " ".join(text.split())
