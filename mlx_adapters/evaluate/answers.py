"""Find the answer in a model's response, and judge it.

Two readings of a response. `strict` takes what the response states as its answer; `paper` is the rule of
LLM-Adapters, kept to compare with its tables.

| kind | paper | strict |
|---|---|---|
| number | the last one; every comma is deleted first | the stated one, else the last |
| letter | the first capital A-E, which also fires inside words ("All", "Because") | the stated one |
| true/false, answer1-5, ... | the first one in lower case | the one that is stated, in any case |

number.py and stated.py define what counts as stated. The strict reading leaves out a model's reasoning: what
stands before the end of a thought, and a thought that is not finished.
"""

import re
from typing import Literal

from mlx_adapters.evaluate.choices import WORDS, Kind
from mlx_adapters.evaluate.number import number
from mlx_adapters.evaluate.stated import stated

__all__ = ["EXTRACTIONS", "RULES", "Extraction", "correct", "extract"]

Extraction = Literal["strict", "paper"]
EXTRACTIONS: tuple[Extraction, ...] = ("strict", "paper")
# How reports name the readings. A new number where a strict reading changes: answers read by different rules
# must not be compared, or mixed by --resume, without a word.
RULES: dict[str, str] = {"strict": "strict 3", "paper": "paper"}
TOLERANCE = 0.001
_NUMBER = re.compile(r"-?\d+\.?\d*")


# mlx-lm's pairs, as `generate_texts` writes them
_THOUGHT_ENDS = re.compile(r"</think>|</longcat_think>|<\|think:end\|>|<channel\|>")
_THOUGHT_BEGINS = re.compile(r"<think>|<longcat_think>|<\|think:start\|>|<\|channel>thought")


def extract(response: str, kind: Kind, *, how: Extraction = "strict", question: str = "") -> str | None:
    """The answer in `response`, None when there is none.

    `question` is the instruction; its choices let the strict reading recognise an answer given as the text of
    a choice, and a list of the choices, which is not an answer.
    """
    reply = response.split("### Response:")[0]  # a model that runs on writes the next item itself
    if how == "paper":
        return _paper(reply, kind)
    reply = _THOUGHT_BEGINS.split(_THOUGHT_ENDS.split(reply.split("### Instruction:")[0])[-1])[0]
    return number(reply) if kind == "number" else stated(reply, kind, question)


def _paper(reply: str, kind: Kind) -> str | None:
    if kind == "number":
        numbers = _NUMBER.findall(reply.replace(",", ""))
        return numbers[-1].rstrip(".") if numbers else None
    found = re.search("[A-E]" if kind == "letter" else "|".join(WORDS[kind]), reply)
    return found.group() if found else None


def correct(kind: Kind, extracted: str | None, label: str) -> bool:
    """Whether the extracted answer is the label (`choices.as_label`): numbers within 0.001, others equal."""
    if extracted is None:
        return False
    if kind == "number":
        return abs(float(extracted) - float(label)) <= TOLERANCE
    return extracted == label
