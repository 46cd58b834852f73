"""Prompt templates: one object for training, evaluation and chat; its name is stored with the adapter.

| name | form |
|---|---|
| alpaca | the instruction template of Stanford Alpaca, clean |
| llm-adapters | the same with the seed's whitespace to the letter; its training and evaluation forms differ |
| chat | the tokenizer's own chat template |
| plain | the prompt as it is |
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, Literal

from mlx_adapters.errors import ConfigError, DataError, unknown

__all__ = ["TEMPLATES", "default_template", "prompt_for", "render", "written_at"]

TEMPLATES = ("alpaca", "llm-adapters", "chat", "plain")
Phase = Literal["train", "eval"]

_TASK = "Below is an instruction that describes a task"
_CONTEXT = ", paired with an input that provides further context"
_WRITE = ". Write a response that appropriately completes the request."
_INDENT = " " * 16


_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_moment: ContextVar[datetime | None] = ContextVar("moment", default=None)


@contextmanager
def written_at(moment: datetime) -> Iterator[None]:
    """Let chat templates that write today's date write that of `moment`: the rows of a run that is resumed
    tomorrow are today's."""
    token = _moment.set(moment)
    try:
        yield
    finally:
        _moment.reset(token)


def _dated(tokenizer: Any) -> dict[str, str]:
    """The chat template to render in `written_at`: with that date where it asks for today's.

    transformers turns a function among a template's variables into text, so the question is answered in the
    template's own text.
    """
    moment, template = _moment.get(), tokenizer.chat_template
    if moment is None or not isinstance(template, str) or not _TODAY.search(template):
        return {}
    written = _TODAY.sub(lambda asked: json.dumps(moment.strftime(asked[2]), ensure_ascii=False), template)
    return {"chat_template": written}


def default_template(fmt: str) -> str:
    """The template for a data format when the user names none."""
    return {"instruction": "alpaca", "messages": "chat"}.get(fmt, "plain")


def prompt_for(
    instruction: str, input: str = "", *, template: str, tokenizer: Any, phase: Phase = "train"
) -> str:
    """The prompt text of one instruction, up to where the model's answer begins.

    Raises ConfigError for an unknown template, or `chat` with a tokenizer that has no chat template.
    """
    if template == "alpaca":
        return _alpaca(instruction, input)
    if template == "llm-adapters":
        return _seed(instruction, input, phase)
    text = f"{instruction}\n\n{input}" if input else instruction
    if template == "plain":
        return text
    if template == "chat":
        return _chat([{"role": "user", "content": text}], tokenizer)
    raise ConfigError(unknown("template", template, TEMPLATES))


def render(row: dict[str, Any], fmt: str, *, template: str, tokenizer: Any) -> tuple[str, str]:
    """(prompt, completion) of one training row.

    `messages` rows use the chat template; the completion is the last assistant turn. `text` rows have no
    prompt. Raises DataError where the row does not fit the template.
    """
    if fmt == "text":
        if template != "plain":
            raise DataError(f"rows of text have no prompt to put into the template {template!r}: use plain")
        return "", row["text"]
    if fmt == "instruction":
        prompt = prompt_for(
            row["instruction"], row.get("input") or "", template=template, tokenizer=tokenizer
        )
        return prompt, row["output"]
    if fmt == "completion":
        return prompt_for(row["prompt"], template=template, tokenizer=tokenizer), row["completion"]
    if template != "chat":
        raise DataError(f"rows of messages need the template chat, found {template!r}: use --template chat")
    *context, last = row["messages"]
    if last.get("role") != "assistant" or not context:
        raise DataError("the last of the messages must be the assistant's, after at least one other")
    return _chat(context, tokenizer), last["content"]


def _alpaca(instruction: str, input: str) -> str:
    context = f"\n\n### Input:\n{input}" if input else ""
    head = _TASK + (_CONTEXT if input else "") + _WRITE
    return f"{head}\n\n### Instruction:\n{instruction}{context}\n\n### Response:\n"


def _seed(instruction: str, input: str, phase: Phase) -> str:
    # (spaces after "request.", the line between blocks): three accidents of the seed's f-strings.
    if phase == "train":
        spaces, separator = (" " if input else "  "), _INDENT
    else:
        spaces, separator = ("" if input else " "), ""
    head = _TASK + (_CONTEXT if input else "") + _WRITE + spaces
    blocks = [f"### Instruction:\n{_INDENT}{instruction}"]
    if input:
        blocks.append(f"### Input:\n{_INDENT}{input}")
    blocks.append(f"### Response:\n{_INDENT}")
    return f"{head}\n\n{_INDENT}" + f"\n{separator}\n{_INDENT}".join(blocks)


def _named(tokenizer: Any) -> str:
    """Where the tokenizer came from, for errors."""
    return str(getattr(tokenizer, "name_or_path", "") or "the tokenizer")


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> str:
    if not tokenizer.has_chat_template:
        raise ConfigError(
            "this tokenizer has no chat template: use --template alpaca or plain, or data without messages"
        )
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **_dated(tokenizer)
        )
    except TemplateError as error:  # many templates refuse roles, or an order of them
        raise DataError(f"{_named(tokenizer)}: its chat template refuses these messages ({error})") from None
    except Exception as error:  # or are none
        raise DataError(f"{_named(tokenizer)}: its chat template cannot be used ({error})") from None
    return text
