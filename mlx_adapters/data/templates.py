"""Prompt templates: one object for training, evaluation and chat; its name is stored with the adapter.

| name | form |
|---|---|
| alpaca | the instruction template of Stanford Alpaca, clean |
| llm-adapters | the same with the seed's whitespace to the letter; its training and evaluation forms differ |
| chat | the tokenizer's own chat template |
| plain | the prompt as it is |
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mlx_adapters.errors import ConfigError, DataError, unknown
from mlx_adapters.models.chat_template import chat_prompt

__all__ = [
    "TEMPLATES",
    "chosen_template",
    "conversation",
    "default_template",
    "prompt_for",
    "render",
]

TEMPLATES = ("alpaca", "llm-adapters", "chat", "plain")
Phase = Literal["train", "eval"]

_TASK = "Below is an instruction that describes a task"
_CONTEXT = ", paired with an input that provides further context"
_WRITE = ". Write a response that appropriately completes the request."
_INDENT = " " * 16


def check(template: str | None) -> None:
    """ConfigError for the name of a template that does not exist; None is none."""
    if template is not None and template not in TEMPLATES:
        raise ConfigError(unknown("template", template, TEMPLATES))


def default_template(fmt: str) -> str:
    """The template for a data format when the user names none."""
    return {"instruction": "alpaca", "messages": "chat"}.get(fmt, "plain")


def chosen_template(*names: str | None, tokenizer: Any = None) -> str:
    """The first of `names` that is set: the user's template, then the adapter's, then a fused adapter's.

    This is the only place that decides what stands in for it. A question gets `chat` where its `tokenizer`
    has a chat template, else `plain`. A test set, for which no tokenizer is passed, gets `alpaca`, so that
    the numbers of all base models compare with the paper's.
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
