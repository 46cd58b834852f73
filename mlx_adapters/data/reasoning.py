"""Reasoning in chats: what a generation prompt leaves open, and what an answer has of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_adapters.errors import DataError
from mlx_adapters.models.chat_template import Rendered, chat_prompt

__all__ = ["PROBE", "before_answer", "common", "left_open", "opens_thinking", "reasoning_of"]

PROBE = "zqxj"
"""An answer that occurs in no template."""
_FIELDS = ("reasoning_content", "reasoning", "thinking")  # one of them, as transformers has it


def left_open(tokenizer: Any) -> str:
    """What the generation prompt opens at its end, a `<think>`, although the template writes answers without
    reasoning without it: they are not trained behind it. Empty where it opens nothing of the kind."""
    try:
        opened, begin, asked, _ = _opening([{"role": "user", "content": "a"}], tokenizer)
    except DataError:  # a template that does not write such a question
        return ""
    return asked[begin:] if opened else ""


def before_answer(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> Rendered:
    """The prompt behind which an answer stands at once: what the template asks with or, where that leaves
    reasoning open, what it writes before an answer that has none."""
    opened, _, asked, probe = _opening(messages, tokenizer)
    return Rendered(probe.partition(PROBE)[0] if opened and PROBE in probe else asked)


def _opening(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> tuple[bool, int, str, str]:
    """(whether the generation prompt leaves reasoning open, how much of it the template writes before an
    answer without any, the prompt, the conversation with such an answer)."""
    asked = str(chat_prompt(messages, tokenizer))
    answered = [*messages, {"role": "assistant", "content": PROBE}]
    probe = str(chat_prompt(answered, tokenizer, answer=False))
    begin = common(asked, probe)
    bare = common(str(chat_prompt(messages, tokenizer, answer=False)), asked)
    return opens_thinking(asked[bare:]) and begin > bare, begin, asked, probe


def opens_thinking(text: str) -> bool:
    """Whether a generation prompt ends in reasoning that it leaves open."""
    opened = text.rpartition("think")[0]
    return bool(opened) and not opened.endswith("/")


def reasoning_of(message: Any) -> str:
    """The reasoning of an answer, in a field of its own or in its content; empty without any."""
    if not isinstance(message, Mapping):
        return ""
    inside, end, _ = str(message.get("content") or "").partition("</think>")
    found = [message.get(name) for name in _FIELDS] + [inside.rpartition("<think>")[2] if end else ""]
    return next((text.strip() for text in found if isinstance(text, str) and text.strip()), "")


def common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
