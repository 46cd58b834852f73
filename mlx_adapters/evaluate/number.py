"""The number that a response gives as its answer: the strict reading of the sets whose answers are numbers.

A number is stated after "the answer is", in \\boxed{} or after "####". The last statement counts, whatever
follows it; without one the last number does. Numbers are read as a person reads them:

    .5   -3 (any minus sign)   1,200   1 200   2.5e3   2.5 x 10^3   1/2   1 1/2   2^3   $-4   -$4

The hyphen of "3-4" is no sign, and the exponent of "18 m^2" no number. A comma before one or two digits is a
decimal comma ("2,5"): a pair of numbers would be no answer.
"""

import math
import re

from mlx_adapters.evaluate.formatting import unformatted

__all__ = ["number"]

_GOLD = re.compile(r"^####\s*(?=[-+]?[$€£]?[\d,.]+\s*$)", re.MULTILINE)  # how GSM8K marks the answer
_DATE = re.compile(r"(\d+)/(\d+)/(\d+)")
_ANSWER = re.compile(
    r"\banswer\b(?:\s+to\s+[^.\n]{1,200}?)?\s*(?:\b(?:is|equals|(?:would|must|should)\s+be)\b|[:=])[\s:=]*",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[.!?](?!\d)|\n|;")
_REASON = re.compile(r"\b(?:because|since|as|where|when|with|for|so|which|that|if|given)\b", re.IGNORECASE)
_FILLER = re.compile(  # what may stand between "the answer is" and its number
    r"(?:[\s$€£¥\"'(\[{~≈+-]|\b(?:about|approximately|roughly|around|exactly|only|just|nearly|almost|negative|"
    r"equal\s+to|a\s+total\s+of|at\s+(?:most|least)|the\s+number|rs\.?|usd)(?![a-z]))*",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"""(?P<whole>\d+)\ +(?P<over>\d+)\ ?/\ ?(?P<under>\d+)(?!\d)
    | (?P<main> \d{1,3}(?P<gap>[,'_\ ])\d{3}(?:(?P=gap)\d{3})*(?!\d)(?:\.\d+)?   # 1,200,000.50
      | \d{1,2}(?:,\d{2})+,\d{3}(?!\d)(?:\.\d+)?                               # 12,00,000
      | (?P<comma>(?<![,\d])\d+,\d{1,2}(?!\d|,\d))
      | \d+(?:\.\d+)? | (?<![\w.)\]])\.\d+ )
      (?: [eE](?P<e>[+-]?\d+)(?!\w) | \s?[x×*·]\s?10\s?\^\s?\(?(?P<ten>[+-]?\d+)
        | \s?\^\s?\(?(?P<power>-?\d+) | \ ?/\ ?(?P<divisor>\d+(?:\.\d+)?)(?!\d) )?""",
    re.VERBOSE | re.IGNORECASE,
)
_EXPONENT = re.compile(r"\^\s*[({]*-?$")
_UNIT = re.compile(r"(?<![A-Za-z])(?:[kcdm]?m|mi|ft|in|yd)$")  # and its square: m2
_CURRENCY = re.compile(r"(?<![A-Za-z])(?:rs|usd|eur|gbp|inr|rm)$", re.IGNORECASE)
_MINUS = re.compile(r"-(?P<gap>\s*)[$€£¥]?\s*$")
_BEFORE_MINUS = re.compile(r"\b(?:is|be|are|was|equals|to|of|gets?|answer)$", re.IGNORECASE)


def number(response: str) -> str | None:
    """The number that `response` gives as its answer, as text that `float` reads; None when it has none."""
    text = _DATE.sub(r"\1 \2 \3", _GOLD.sub("answer: ", unformatted(response)))
    for answer in reversed(list(_ANSWER.finditer(text))):
        stated = _stated(text[answer.end() :])
        if stated is not None:
            return stated
    found = _numbers(text)
    return found[-1][1] if found else None


def _stated(rest: str) -> str | None:
    """The number that follows "the answer is": the result of an equation, else the one right there, else the
    last of the sentence."""
    if re.match(r"\W*not\b", rest, re.IGNORECASE):
        return None
    for part in (_SENTENCE.split(rest, maxsplit=1)[0], rest.split("\n", maxsplit=1)[0]):
        _, equals, result = _REASON.split(part, maxsplit=1)[0].rpartition("=")
        if equals and len(found := _numbers(result)) == 1:
            return found[0][1]
        found = _numbers(part)
        if found:
            start = _FILLER.match(part)
            return found[0 if start and start.end() >= found[0][0] else -1][1]
    return None


def _numbers(text: str) -> list[tuple[int, str]]:
    """(start, number) of each number; parts of a word ("x2", "CO2") only where there is no other."""
    free: list[tuple[int, str]] = []
    attached: list[tuple[int, str]] = []
    for found in _NUMBER.finditer(text):
        start, before = found.start(), text[: found.start()]
        if _EXPONENT.search(before) or (found[0] in "23" and _UNIT.search(before)):
            continue
        value = ("-" if _negative(before) else "") + _value(found)
        part = before[-1:].isalpha() and not _CURRENCY.search(before)
        (attached if part else free).append((start, value))
    return free or attached


def _negative(before: str) -> bool:
    """Whether what stands before a number is its sign, not a hyphen, a dash, a bullet or a subtraction."""
    minus = _MINUS.search(before)
    if minus is None:
        return re.search(r"\bnegative\s+[$€£¥]?$", before, re.IGNORECASE) is not None
    left, apart = before[: minus.start()], minus["gap"] != ""
    last = left.rstrip(" \t")
    if not last or last.endswith("\n"):
        return not apart
    if last[-1].isdigit() or last[-1] in ")]}%":
        return False
    if last[-1].isalpha() or last[-1] in ".!?":
        return left != last and (not apart or _BEFORE_MINUS.search(last) is not None)
    return True


def _value(found: re.Match[str]) -> str:
    """The number as text; only what has to be computed is, and what cannot be is left at its first part."""
    if found["whole"]:
        whole, over, under = (float(found[name]) for name in ("whole", "over", "under"))
        return f"{(whole if over < under else 0) + over / under:.12g}" if under else found["over"]
    main = found["main"].replace(",", ".") if found["comma"] else re.sub("[,'_ ]", "", found["main"])
    main = f"0{main}" if main.startswith(".") else main
    try:
        if exponent := found["e"] or found["ten"]:
            large = float(f"{main}e{exponent}")
            return f"{large:.12g}" if math.isfinite(large) else f"{main}e{exponent}"
        if found["power"]:
            return f"{float(main) ** float(found['power']):.12g}"
        if found["divisor"]:
            return f"{float(main) / float(found['divisor']):.12g}"
    except (OverflowError, ZeroDivisionError):
        pass
    return main
