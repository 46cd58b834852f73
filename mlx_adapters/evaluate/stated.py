"""The label that a response gives as its answer: the strict reading of letters and of words such as answer3.

The first of these that finds something decides:

1. what is stated: a label, or the text of a choice, after "the answer is", in \\boxed{} or <answer>
2. a letter that stands alone on the last or the first line
3. what is concluded: "therefore C", "it should be C", "C is correct"
4. the only label that is named, "not C" and "C is wrong" aside; several are no answer
5. the only choice whose text is named; of a letter's choices in the last line, where reasoning ends

Two labels in one statement ("A or B") are no answer. Of several statements the last letter counts, because
reasoning may correct itself; words must agree: "The answer is yes. The answer is no." settles nothing. The
question and a list of the options that the response repeats are left out first.
"""

import re
from dataclasses import dataclass
from functools import cache

from mlx_adapters.evaluate.choices import WORDS, Kind, parse
from mlx_adapters.evaluate.formatting import unformatted

__all__ = ["stated"]

_TRUTH = {"true": "true", "yes": "true", "false": "false", "no": "false"}
_ANSWER = re.compile(
    r"\b(?:answer|solution|choice|option|ending)\b(?:\s+(?:choice|option|letter))?"
    r"(?:\s+to\s+(?:the|this)\s+question(?:\s+\"[^\"\n]*\")?)?"
    r"\s*(?:\bis\b|\b(?:would|must|should|has\s+to)\s+be\b|->|[:=])\s*[:=]?\s*"
    r"(?:(?:indeed|therefore|thus|definitely|clearly|probably|simply)\b,?\s+)?",
    re.IGNORECASE,
)
_CONCLUDES = (
    r"(?i:\b(?:therefore|thus|hence|so|consequently)\b,?\s*(?:it\s+is\b)?"
    r"|\b(?:must|should|would|has\s+to)\s+be\b|\b(?:choose|chose|pick|select|go\s+with)\b)\s*"
)
_RIGHT = r"\s+(?:is|seems)\s+(?:indeed\s+)?(?:the\s+)?(?:most\s+)?(?:correct|right|best|true|appropriate)\b"
_OPEN = r"(?i:the\s+)?(?i:(?:option|choice|letter|number)\s+)?[\s\"'*$(\[{]*"
_END = r"(?=[\s\"'*$)\]}]*(?:[.,;:!?]|\n|$))"
# "No, it is not", and not "no idea"
_YES_NO = rf"(?:yes|no)(?:{_END}|(?=\s+(?:it|they|he|she|we|you|this|that|these|there|the|because|since)\b))"
_NOT_BEFORE = re.compile(r"(?:\bnot|n't)\s+[\"'(]*$", re.IGNORECASE)
_NOT_AFTER = re.compile(
    r"[\"')\]]*\s+(?:is|are|was)(?:\s+not|n't|\s+(?:wrong|incorrect|false))\b", re.IGNORECASE
)
_NOT = re.compile(r"\W*(?:not|neither)\b", re.IGNORECASE)
_FORMAT = re.compile(r"answer format\b[^.\n]*", re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?](?=\s|$)|\n")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
# What may follow a label, but no noun that "A" or "2" goes with.
_GOES_ON = r"(?:because|since|as|is|for|which|by|due|and|or|but|when|if|given|with|then|so|not)\b"


@dataclass(frozen=True)
class _Patterns:
    """How a kind's labels are written: in a list of the options, where one is stated, where it is concluded,
    and by themselves in the order in which they are looked for. One group of a match is the label."""

    mark: re.Pattern[str]
    stated: re.Pattern[str]
    concluded: re.Pattern[str]
    named: tuple[re.Pattern[str], ...]


def stated(response: str, kind: Kind, question: str) -> str | None:
    """The label that `response` gives as its answer to `question`, None where it gives none or several."""
    offered = parse(question, kind)
    texts = {label: _words(unformatted(text)) for label, text in offered.texts.items()} if offered else {}
    if kind == "true/false":
        texts = {}
    found = _patterns(kind)
    reply = _FORMAT.sub("", unformatted(response))
    if offered and offered.question:
        reply = reply.replace(unformatted(offered.question), " ")
    reply = _without_list(reply, texts, found.mark, kind)
    labels = _statements(reply, kind, texts)
    if labels and labels[-1] and (kind == "letter" or len(set(labels)) == 1):
        return labels[-1]
    if kind == "letter" and (alone := _alone(reply, texts)):
        return alone
    if labels:
        return None
    concluded = [_label(match, kind) for match in found.concluded.finditer(reply) if not _negated(match)]
    if concluded and (kind == "letter" or len(set(concluded)) == 1):
        return concluded[-1]
    for pattern in found.named:
        named = {_label(match, kind) for match in pattern.finditer(reply) if not _negated(match)}
        if named:
            return named.pop() if len(named) == 1 else None
    if kind == "true/false":
        start = re.match(rf"[\s\"'*]*({_YES_NO})", reply, re.IGNORECASE)
        return _TRUTH[start[1].lower()] if start else None
    last = (reply.strip().splitlines() or [""])[-1] if kind == "letter" else reply
    return _only(_words(last), texts)


@cache
def _patterns(kind: Kind) -> _Patterns:
    if kind == "letter":
        return _letters()
    if kind == "true/false":
        return _words_of(rf"(?:(?P<x>true|false)(?!\w)|(?P<y>{_YES_NO}))", r"\b(?P<x>true|false)(?!\w)")
    number = f"[1-{WORDS[kind][-1][-1]}]"
    # "the answer is 2": a bare number only where a sentence states it, and not in "2 metres" or "2.5"
    bare = rf"{number}(?![.,]?\d|[^\S\n]*(?:%|(?!{_GOES_ON})[a-z]))"
    label = rf"(?:(?P<x>{kind}\s?{number})|(?P<y>{bare}))(?!\w)"
    return _words_of(label, rf"\b(?P<x>{kind}\s?{number})(?!\w)")


def _letters() -> _Patterns:
    # "A" is an article where a noun follows; a small letter counts where nothing does
    capital = rf"(?:A(?!\s+(?!{_GOES_ON})[a-z])|[B-E])(?!'?\w)"
    bracketed = r"(?P<x>[A-Ea-e])\s*[)\]}]"
    stated = rf"{_OPEN}(?:{bracketed}|(?P<y>{capital})|(?P<z>[a-e]){_END})"
    concluded = rf"{_CONCLUDES}{_OPEN}(?:{bracketed}|(?P<y>[A-E])(?!'?\w)){_END}"
    right = rf"(?<![\w'])(?P<z>[A-E])[)\]\"']*{_RIGHT}"
    named = (  # "A:" is short for "Answer:", and "A.M." no letter
        r"(?<!\w)[(\[]\s*(?P<x>[A-Ea-e])\s*[)\]]",
        r"(?m:^)\W*(?!A\s*:)(?P<x>[A-E])\s*[).:](?=\s)",
        r"\b(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s+(?P<x>[A-E])(?!'?\w)",
        r"(?<![\w'])(?<![A-Za-z]\.)(?!A\s*:)(?P<x>[A-E])(?!'?\w|\.\w)(?!\s+[a-z])",
    )
    mark = r"(?<!\w)[(\[]?\s*(?P<x>[A-E])\s*[)\].:]"
    patterns = (mark, stated, f"{concluded}|{right}", *named)
    first, second, third, *rest = (re.compile(pattern) for pattern in patterns)
    return _Patterns(first, second, third, tuple(rest))


def _words_of(label: str, named: str) -> _Patterns:
    """Words in any case; `label` is one in a sentence that states it, `named` one by itself."""
    patterns = (rf"{named}\s*[).:]?", _OPEN + label, _CONCLUDES + _OPEN + named + _END, named)
    mark, stated, concluded, alone = (re.compile(pattern, re.IGNORECASE) for pattern in patterns)
    return _Patterns(mark, stated, concluded, (alone,))


def _label(match: re.Match[str], kind: Kind) -> str:
    value = next(group for group in match.groups() if group)
    if kind == "letter":
        return value.upper()
    return _TRUTH[value.lower()] if kind == "true/false" else f"{kind}{value[-1]}"


def _negated(match: re.Match[str]) -> bool:
    group = next(name for name in "xyz" if match.groupdict().get(name))
    before, after = match.string[: match.start(group)], match.string[match.end(group) :]
    return _NOT_BEFORE.search(before) is not None or _NOT_AFTER.match(after) is not None


def _statements(reply: str, kind: Kind, texts: dict[str, str]) -> list[str]:
    """The labels that the response states as its answer, one each time it does; "" for "A or B"."""
    pattern, found = _patterns(kind).stated, []
    for answer in _ANSWER.finditer(reply):
        match = pattern.match(reply, answer.end())
        if match is None:
            working = re.match(r"solution\s*[:=]", answer[0], re.IGNORECASE)  # "Solution: Tom walks 5 km and"
            label = None if working else _text_stated(reply[answer.end() :], texts)
        else:
            label = _label(match, kind)
            if kind != "letter":  # "the answer is 4": rather the choice that says 4 than answer4
                label = next((one for one, text in texts.items() if text == match[0].strip()), label)
            other = re.match(r"[\s\"'*$)\]},]*(?:\bor\b|/|\|)\s*", reply[match.end() :])
            if other and pattern.match(reply, match.end() + other.end()):
                label = ""
        if label is not None:
            found.append(label)
    return found


def _text_stated(rest: str, texts: dict[str, str]) -> str | None:
    """The choice whose text follows: at once, or as the only one in the sentence or the line."""
    if _NOT.match(rest):
        return None
    rest = rest.lstrip()
    start = f"{_words(rest)} "
    first = [label for label, text in texts.items() if text and start.startswith(f"{text} ")]
    if first:
        return max(first, key=lambda label: len(texts[label]))
    parts = _SENTENCE.split(rest, maxsplit=1)[0], rest.split("\n", maxsplit=1)[0]
    found = (_only(_words(part), texts) or _with_number(_words(part), texts) for part in parts)
    return next(filter(None, found), None)


def _with_number(reply: str, texts: dict[str, str]) -> str | None:
    """The one choice with the number that is all of the reply: "50" for "50 seconds", "Rs. 50", "50%"."""
    if not re.fullmatch(r"[$\-]*\d+(?:\.\d+)?%?", reply):
        return None
    value = _NUMBER.findall(reply)
    hits = [label for label, text in texts.items() if _NUMBER.findall(text) == value]
    return hits[0] if len(hits) == 1 else None


def _alone(reply: str, texts: dict[str, str]) -> str | None:
    """The letter that is all the last line or the first one says, or that stands there with its own text;
    None where other lines do so with other letters."""
    found = []
    for line in reply.strip().splitlines():
        start = re.match(r"[\W_]*(?!A:\s*$)([A-Ea-e])(?!'?\w)[\W_]*", line)
        alone = start and _words(line[start.end() :]) in ("", texts.get(start[1].upper()))
        found.append(start[1].upper() if start and alone else None)
    letters = {letter for letter in found if letter}
    return letters.pop() if len(letters) == 1 and (found[0] or found[-1]) else None


def _only(reply: str, texts: dict[str, str]) -> str | None:
    """The one choice whose text is in the reply."""
    hits = {label: text for label, text in texts.items() if text and f" {text} " in f" {reply} "}
    # A choice inside another one ("5" in "5 km") is not meant when the longer one is there.
    best = [
        label
        for label, text in hits.items()
        if not any(text != other and text in other for other in hits.values())
    ]
    return best[0] if len(best) == 1 else None


def _without_list(reply: str, texts: dict[str, str], mark: re.Pattern[str], kind: Kind) -> str:
    """`reply` without the options that it repeats one after the other, the last one perhaps cut short."""
    marks = list(mark.finditer(reply))
    labels = [_label(match, kind) for match in marks]
    ends = [match.start() for match in marks[1:]] + [len(reply)]
    follow = [_words(reply[match.end() : end]) for match, end in zip(marks, ends)]
    first = 0
    for place in range(len(marks) - 1, 0, -1):  # from the end, so that what is left keeps its place
        first = place
        while (
            first and labels[first - 1] < labels[first] and follow[first - 1] == texts.get(labels[first - 1])
        ):
            first -= 1
        text = texts.get(labels[place], "")
        if first < place and text and f"{follow[place]} ".startswith(f"{text} "):
            end = _end_of(text, reply, marks[place].end())
        elif first < place and text.startswith(follow[place]) and ends[place] == len(reply):
            end = len(reply)
        else:
            continue
        return _without_list(f"{reply[: marks[first].start()]}\n{reply[end:]}", texts, mark, kind)
    return reply


def _end_of(text: str, reply: str, start: int) -> int:
    """Where the words of `text` end that begin at `start`."""
    for end in range(start, len(reply)):
        if not reply[end].isalnum() and _words(reply[start:end]) == text:
            return end
    return len(reply)


def _words(text: str) -> str:
    """Lower case, without the first article, digits' commas and other punctuation; signs and points stay."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.casefold())
    text = re.sub(r"[^\w\-./%$^]|\.(?!\d)", " ", text)
    return " ".join(re.sub(r"^\s*(?:the|an|a)\s+(?=\S)", "", text).split())
