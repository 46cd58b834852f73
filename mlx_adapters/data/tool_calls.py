"""Tool calls as a chat template writes them: whether it does, and what closes one."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_adapters.errors import DataError
from mlx_adapters.models.chat_template import chat_prompt

__all__ = ["call_end", "must_write"]


def must_write(calls: Any, text: str) -> None:
    """DataError where the text of an answer is without its tool calls: many templates leave them out."""
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name not in text:
            raise DataError(
                f"the chat template does not write tool calls ({name}), so the answer would be without: give "
                "a --template that writes them, or leave such rows out"
            )


def call_end(
    text: str, messages: Sequence[Mapping[str, Any]], tokenizer: Any, kwargs: Mapping[str, Any]
) -> str:
    """The token that closes a tool call which other answers' token does not: the one that opens the tool's
    answer (GLM). Empty where `text` ends with one of its own (gpt-oss), or none is known.

    Args:
        text: what the template writes up to the call, which ends it.
        messages: the conversation up to the call, or to the tool's answer.
        tokenizer: it brings the chat template.
        kwargs: the template's own variables.
    """
    special = tuple(str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special)
    if text.endswith(special):
        return ""
    answered = messages[-1].get("role") == "tool"
    try:
        turns = messages if answered else [*messages, {"role": "tool", "content": ""}]
        longer = str(chat_prompt(turns, tokenizer, kwargs, answer=False))
    except DataError:  # a template that has no such role
        return ""
    follows = longer[len(text) :] if longer.startswith(text) else ""
    return max((token for token in special if follows.startswith(token)), key=len, default="")
