"""The arguments of tool calls in the form that a chat template takes."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_adapters.errors import DataError
from mlx_adapters.models.chat_template import chat_prompt

__all__ = ["with_arguments"]

Messages = Sequence[Mapping[str, Any]]


def with_arguments(messages: Messages, tokenizer: Any, kwargs: Mapping[str, Any]) -> Messages:
    """The messages with the arguments of their tool calls as the chat template takes them.

    They stay as they are but for two cases: text, as OpenAI has it, becomes an object where the template
    would write it once more as JSON, in quotes; an object becomes text where the template takes no object.
    """
    given = [_function(call).get("arguments") for turn in messages for call in _calls(turn)]
    if not given:
        return messages
    written, texts = _written(messages, tokenizer, kwargs), [each for each in given if isinstance(each, str)]
    if written and not any(json.dumps(text, ensure_ascii=False) in written for text in texts):
        return messages
    for form in (_object, _text):
        other = [_with(turn, form) for turn in messages]
        if _written(other, tokenizer, kwargs):
            return other
    return messages


def _written(messages: Messages, tokenizer: Any, kwargs: Mapping[str, Any]) -> str:
    try:
        return str(chat_prompt(messages, tokenizer, kwargs, answer=False))
    except DataError:
        return ""


def _with(turn: Mapping[str, Any], form: Callable[[Any], Any]) -> Mapping[str, Any]:
    made = []
    for call in _calls(turn):
        function = dict(_function(call))
        if "arguments" in function:
            function["arguments"] = form(function["arguments"])
        made.append({**call, "function": function} if "function" in call else {**call, **function})
    return {**turn, "tool_calls": made} if made else turn


def _calls(turn: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    calls = turn.get("tool_calls")
    return [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else ()


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    found = call.get("function", call)
    return found if isinstance(found, Mapping) else {}


def _object(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
