"""Conversations encoded, and what is learned of them as text."""

from itertools import groupby
from typing import Any

from mlx_adapters.data.sources import Rows
from mlx_adapters.data.tokens import Encoded, Example, encode

__all__ = ["TWO_TURNS", "bracketed", "encoded", "labels"]

TWO_TURNS = [
    {"role": "user", "content": "tom has 3"},
    {"role": "assistant", "content": "he has 3"},
    {"role": "user", "content": "how?"},
    {"role": "assistant", "content": "so"},
]


def labels(example: Example) -> list[bool]:
    """Whether each token of an example has a label."""
    found = [index >= example.loss_start for index in range(len(example.ids))]
    for begin, end in example.unlabelled:
        found[begin:end] = [False] * (end - begin)
    return found


def bracketed(example: Example, tokenizer: Any) -> str:
    """The text of an example with what is learned in brackets."""
    parts, tagged = [], zip(labels(example), example.ids, strict=True)
    for learned, run in groupby(tagged, key=lambda pair: pair[0]):
        text = tokenizer.decode([id for _, id in run])
        parts.append(f"[{text}]" if learned else text)
    return "".join(parts)


def encoded(tokenizer: Any, messages: list[dict[str, Any]], **settings: Any) -> Encoded:
    row = {"messages": messages} | settings.pop("row", {})
    return encode(Rows([row], "messages", "here"), tokenizer, template="chat", **settings)
