"""Prompt templates: one object for training, evaluation and chat; its name is stored with the adapter.

| name | form |
|---|---|
| alpaca | the instruction template of Stanford Alpaca, clean |
| llm-adapters | the same with the seed's whitespace to the letter; its training and evaluation forms differ |
| chat | the tokenizer's own chat template |
| plain | the prompt as it is |
"""

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, Literal

from mlx_adapters.errors import ConfigError, DataError, unknown

__all__ = [
    "TEMPLATES",
    "Rendered",
    "chat_prompt",
    "chat_writer",
    "chosen_template",
    "conversation",
    "default_template",
    "prompt_for",
    "render",
    "written_at",
]

TEMPLATES = ("alpaca", "llm-adapters", "chat", "plain")
Phase = Literal["train", "eval"]

_TASK = "Below is an instruction that describes a task"
_CONTEXT = ", paired with an input that provides further context"
_WRITE = ". Write a response that appropriately completes the request."
_INDENT = " " * 16


class Rendered(str):
    """Text that a chat template wrote: every special token is in it, so encoding it adds none."""


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


def _dated(tokenizer: Any, tools: Any) -> dict[str, str]:
    """The chat template to render in `written_at`: with that date where it asks for today's.

    transformers turns a function among a template's variables into text, so the question is answered in the
    template's own text.
    """
    moment = _moment.get()
    if moment is None or not tokenizer.chat_template:
        return {}
    template = tokenizer.get_chat_template(tools=tools)
    if not _TODAY.search(template):
        return {}
    written = _TODAY.sub(lambda asked: json.dumps(moment.strftime(asked[2]), ensure_ascii=False), template)
    return {"chat_template": written}


def default_template(fmt: str) -> str:
    """The template for a data format when the user names none."""
    return {"instruction": "alpaca", "messages": "chat"}.get(fmt, "plain")


def chosen_template(*names: str | None, tokenizer: Any = None) -> str:
    """The first of `names` that is given: the user's, then the adapter's.

    Without one, `chat` where the tokenizer has a chat template and else `plain`; where no tokenizer is given,
    because a test set is measured, the paper's `alpaca`.
    """
    fallback = "alpaca" if tokenizer is None else "chat" if tokenizer.has_chat_template else "plain"
    return next(filter(None, names), fallback)


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
        return chat_prompt([{"role": "user", "content": text}], tokenizer)
    raise ConfigError(unknown("template", template, TEMPLATES))


def conversation(
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str,
    tokenizer: Any,
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The prompt of a conversation, up to where the model's answer begins; `kwargs` are the chat template's.

    The other templates hold one question each: the earlier turns are written in front of the last.
    """
    if template == "chat":
        return chat_prompt(messages, tokenizer, kwargs)
    if kwargs:
        raise ConfigError(
            f"chat_template_kwargs ({', '.join(kwargs)}) are read by the template chat, not by {template}"
        )
    parts = []
    for message in messages:
        if message["role"] == "user":
            parts.append(prompt_for(message["content"], template=template, tokenizer=tokenizer, phase="eval"))
        else:
            parts.append(message["content"] + "\n\n")
    return "".join(parts)


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
    if row.get("system"):
        if context[0]["role"] == "system":
            raise DataError("field 'system' and a first message of the role system: keep one of the two")
        context = [{"role": "system", "content": row["system"]}, *context]
    kwargs = {**(row.get("chat_template_kwargs") or {}), **({"tools": t} if (t := row.get("tools")) else {})}
    _refuse_unlearned(context, last, tokenizer, kwargs)
    return chat_prompt(context, tokenizer, kwargs), last["content"]


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    answer: bool = True,
) -> Rendered:
    """What the tokenizer's chat template writes for `messages`, exactly as transformers renders it.

    `kwargs` are the template's own variables (`tools`, `enable_thinking`, ...): what is not given is left to
    the template, and one that it does not read is refused. With `answer` the text ends where the answer
    begins. Raises ConfigError without a chat template, DataError where it refuses the messages.
    """
    if not tokenizer.has_chat_template:
        raise ConfigError(
            "this tokenizer has no chat template: use --template alpaca or plain, or data without messages"
        )
    from jinja2 import TemplateError

    kwargs, write = dict(kwargs or {}), chat_writer(tokenizer)
    arguments = {*inspect.signature(write).parameters} if kwargs else set()
    if wrong := sorted((arguments - {"tools", "documents", "args", "kwargs"}) & {*kwargs}):
        raise DataError(f"chat_template_kwargs {wrong[0]!r} is not the template's: leave it out")
    try:
        text: str = write(
            list(messages),
            tokenize=False,
            add_generation_prompt=answer,
            **_dated(tokenizer, kwargs.get("tools")),
            **kwargs,
        )
    except TemplateError as error:  # many templates refuse roles, or an order of them
        raise DataError(f"{_named(tokenizer)}: its chat template refuses these messages ({error})") from None
    except Exception as error:  # or are none
        raise DataError(f"{_named(tokenizer)}: its chat template cannot be used ({error})") from None
    _refuse_unread(kwargs, tokenizer)
    return Rendered(text)


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


def chat_writer(tokenizer: Any) -> Any:
    """transformers' `apply_chat_template`.

    mlx-lm's wrapper sets `enable_thinking` by the vocabulary, whatever the template's own default is. It is
    asked only where it renders by a function of its own, for models that have no template.
    """
    inner: Any = getattr(tokenizer, "_tokenizer", None)
    wrapped = hasattr(inner, "apply_chat_template") and getattr(tokenizer, "_chat_template", None) is None
    return (inner if wrapped else tokenizer).apply_chat_template


def _refuse_unread(kwargs: dict[str, Any], tokenizer: Any) -> None:
    """DataError for a variable that the template never names, which would change nothing."""
    if not kwargs or not tokenizer.chat_template:  # a renderer that is no template says itself what it takes
        return
    source = tokenizer.get_chat_template(tools=kwargs.get("tools"))
    for name in kwargs:
        if not re.search(rf"\b{re.escape(str(name))}\b", source):
            raise DataError(
                f"{_named(tokenizer)}: its chat template does not read {name!r}, so it would change nothing: "
                "leave it out"
            )


def _refuse_unlearned(
    context: list[dict[str, Any]], last: dict[str, Any], tokenizer: Any, kwargs: dict[str, Any]
) -> None:
    """DataError where the answer has more than its text: only the text is learned."""
    if last.get("weight", 1) == 0 or last.get("train") is False:
        raise DataError("the last of the messages is marked as not to be learned: take the row out")
    others = [name for name, value in last.items() if name not in ("role", "content") and value]
    if not others:
        return
    plain = {"role": last["role"], "content": last["content"]}
    both = [chat_prompt([*context, turn], tokenizer, kwargs, answer=False) for turn in (last, plain)]
    if both[0] != both[1]:
        raise DataError(
            f"the last of the messages has {', '.join(map(repr, others))}, which the chat template writes "
            "and training would leave out: write it into 'content', or take it out"
        )
