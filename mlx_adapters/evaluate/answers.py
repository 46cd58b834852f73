"""Find the answer in a model's response, and judge it.

Two readings of a response. `strict` takes what the response states as its answer; `paper` is the rule of
LLM-Adapters, kept to compare with its tables.

| kind | paper | strict |
|---|---|---|
| number | the last number | the same |
| letter | the first capital A-E, which also fires inside words ("All", "Because") | the last stated one |
| true/false, answer1-5, ... | the first one in lower case | the one that is stated, in any case |

For the words of the last row a response is strict only if it settles on one: "either solution1 or solution2"
and "The answer is yes. The answer is no." are no answers. Text of a choice counts where no label is named.
"""

import re
from typing import Literal

from mlx_adapters.evaluate.choices import WORDS, Kind, parse

__all__ = ["EXTRACTIONS", "Extraction", "correct", "extract"]

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
# "the answer is", "answer to the question "..." is indeed", "correct option:", up to quotes and brackets
_IS = (
    r"\b(?:answer|solution|choice|option|ending)\b(?:\s+(?:choice|option))?"
    r"(?:\s+to\s+(?:the|this)\s+question(?:\s+\"[^\"\n]*\")?)?"
    r"\s*(?:\bis\b|would\s+be|must\s+be|:)\s*:?\s*(?:(?:indeed|therefore|definitely|clearly|probably)\s+)?"
)
_OPEN = r"(?:the\s+)?(?:(?:option|choice|number)\s+)?[\s\"'*(\[]*"
_NEGATED = re.compile(r"(?:\bnot|n't)\s+[\"'(]*$", re.IGNORECASE)
_FORMAT = re.compile(r"answer format\b.*", re.IGNORECASE)
_YES_NO = re.compile(r"[\s\"'*]*(yes|no)\b", re.IGNORECASE)
_TRUTH = {"true": "true", "yes": "true", "false": "false", "no": "false"}


def extract(response: str, kind: Kind, *, how: Extraction = "strict", question: str = "") -> str | None:
    """The answer in `response`, None when there is none.

    `question` is the instruction; its choices let the strict reading recognise an answer given as the text of
    a choice.
    """
    said = response.split("### Response:")[0]  # a model that runs on writes the next item itself
    if how == "strict":
        said = said.split("### Instruction:")[0]
    if kind == "number":
        return _number(said)
    if how == "paper":
        found = (_LETTER if kind == "letter" else re.compile("|".join(WORDS[kind]))).search(said)
        return found.group() if found else None
    if kind == "letter":
        last = (said.strip().splitlines() or [""])[-1]
        return _stated_letter(said) or _choice_text(last, question, kind)
    return _stated_word(said, kind, question)


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


def _stated_word(response: str, kind: Kind, question: str) -> str | None:
    """The label that "answer is X" names; else the only one named; else the one whose text is given."""
    response = _FORMAT.sub("", response)
    label, stated = _patterns(kind)
    for pattern in (stated, label):
        found = [
            match for match in pattern.finditer(response) if not _NEGATED.search(response[: match.start()])
        ]
        named = {_as_label(match, kind) for match in found}
        if named:
            return named.pop() if len(named) == 1 else None
    if kind == "true/false":
        start = _YES_NO.match(response)
        return _TRUTH[start[1].lower()] if start else None
    return _choice_text(response, question, kind)


def _patterns(kind: Kind) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """(a label by itself, a label that a sentence states)."""
    if kind == "true/false":
        label, loose = r"(?P<x>true|false)", r"(?P<x>true|false|yes|no)"
    else:
        label = rf"{kind}\s?(?P<x>[1-{WORDS[kind][-1][-1]}])"
        # "the answer is 2": a bare number only where a sentence states it, and not in "2 metres" or "2.5"
        number = rf"(?P<x>[1-{WORDS[kind][-1][-1]}])(?![.,]?\d|\s*[a-z%])"
        loose = rf"(?:{kind}\s?(?P<y>[1-{WORDS[kind][-1][-1]}])|{number})"
    return (
        re.compile(rf"\b{label}(?!\w)", re.IGNORECASE),
        re.compile(rf"{_IS}{_OPEN}{loose}(?!\w)", re.IGNORECASE),
    )


def _as_label(match: re.Match[str], kind: Kind) -> str:
    value = next(group for group in match.groups() if group).lower()
    return _TRUTH[value] if kind == "true/false" else f"{kind}{value}"


def _choice_text(said: str, question: str, kind: Kind) -> str | None:
    """The one choice whose text stands in what was said."""
    choices = parse(question, kind)
    if choices is None:
        return None
    said = _plain(said)
    texts = {label: _plain(text) for label, text in choices.texts.items()}
    hits = {label: text for label, text in texts.items() if text and f" {text} " in f" {said} "}
    # A choice inside another one ("5" in "5 km") is not meant when the longer one is there.
    best = [
        label
        for label, text in hits.items()
        if not any(text != other and text in other for other in hits.values())
    ]
    return best[0] if len(best) == 1 else None


def _plain(text: str) -> str:
    """Lower case, digits' commas gone, other punctuation to spaces; signs and decimal points stay."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.casefold())
    text = re.sub(r"[^\w\-./%$]|\.(?!\d)", " ", text)
    return " ".join(text.split())
