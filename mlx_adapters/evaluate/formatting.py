"""A response without LaTeX, Markdown and HTML, and with one character for each quotation mark and dash.

What a box or an answer tag holds is stated as the answer: "\\boxed{B}" becomes "answer: B".
"""

import re
import unicodedata

__all__ = ["unformatted"]

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_ONE_CHARACTER = (
    dict.fromkeys(map(ord, "\u2010\u2012\u2013\u2212"), "-")
    | dict.fromkeys(map(ord, "\u201c\u201d\u201e\u00ab\u00bb"), '"')
    | dict.fromkeys(map(ord, "\u2018\u2019\u201a"), "'")
    | {0x2014: " ", 0x2044: "/"}
)
_REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"(?<=\d)(?=\\[dt]?frac)", " "),  # 1\frac{1}{2}
        (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2"),
        (r"\\[dt]?frac\s*(\d)\s*(\d)", r"\1/\2"),
        (r"\{,\}", ","),
        (r"\\!", ""),
        (r"\\[,;: ()\[\]]", " "),
        (r"\\([$%#&_])", r"\1"),
        (r"\\(?:text\w*|math\w+|mbox|operatorname)\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:times|cdot)\b", "*"),
        (r"\^\s*\{?\s*\\circ\s*\}?", ""),
        (r"\^\{(-?\d+)\}", r"^\1"),
        (r"\\f?boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r" answer: \1\n"),
        (r"<answer>", " answer: "),
        (r"</?[A-Za-z]\w*\s*/?>", "\n"),
        (r"(?<=\d)\*\*(?=\d)", "^"),  # a power in a program
        (r"\*\*|`", ""),
        (r"(?<!\w)_+(?=[^\s_])|(?<=[^\s_])_+(?!\w)", ""),
    )
]


def unformatted(text: str) -> str:
    """`text` as plain words and numbers; what a superscript says follows a ^."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: "^" + found[0].translate(_SUPERSCRIPTS), text)
    text = re.sub("(?<=\\d)(?=[¼-¾⅐-⅞])", " ", text)  # 1½ is not 11/2
    text = unicodedata.normalize("NFKC", text).translate(_ONE_CHARACTER)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return text
