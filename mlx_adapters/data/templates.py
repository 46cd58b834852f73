"""Prompt templates: one object for training, evaluation and chat; its name is stored with the adapter.

| name | form |
|---|---|
| alpaca | the instruction template of Stanford Alpaca, clean |
| llm-adapters | the same with the seed's whitespace to the letter; its training and evaluation forms differ |
| chat | the tokenizer's own chat template, or the one of a file that the user names |
| plain | the prompt as it is |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_adapters.errors import ConfigError, DataError, unknown
from mlx_adapters.files.documents import json_option
from mlx_adapters.models.chat_template import chat_prompt
from mlx_adapters.models.own_template import OWN, ChatTemplate, read_template, template_file

__all__ = [
    "TEMPLATES",
    "Asked",
    "asked",
    "chosen_template",
    "conversation",
    "default_template",
    "messages_of",
    "prompt_for",
    "question_of",
    "render",
    "wanted_template",
]

TEMPLATES = ("alpaca", "llm-adapters", "chat", "plain")
Phase = Literal["train", "eval"]

_TASK = "Below is an instruction that describes a task"
_CONTEXT = ", paired with an input that provides further context"
_WRITE = ". Write a response that appropriately completes the request."
_INDENT = " " * 16


@dataclass(frozen=True)
class Asked:
    """A prompt template of `TEMPLATES`, and how it writes chats where it is `chat`."""

    template: str
    chat: ChatTemplate = OWN

    def on(self, tokenizer: Any) -> Any:
        """The tokenizer to write prompts with, which ends answers where these templates do."""
        return self.chat.on(tokenizer) if self.template == "chat" else tokenizer


def wanted_template(name: str | None) -> str | ChatTemplate | None:
    """What a user's word for a template means: a name of `TEMPLATES`, or the chat template in that file, read
    now. Raises ConfigError for an unknown name, or a file that cannot be read."""
    if file := template_file(name) if name else None:
        return ChatTemplate(read_template(file), origin=str(file))
    check(name)
    return name


def asked(
    wanted: str | ChatTemplate | None,
    kwargs: str | Mapping[str, Any] | None,
    *known: tuple[str, ChatTemplate],
    tokenizer: Any = None,
    fallback: str = "",
) -> Asked:
    """The templates that count. This is the only place that decides it.

    Args:
        wanted: what the user asks for: a name of `TEMPLATES`, a file with a chat template, or what
            `wanted_template` made of it.
        kwargs: the user's variables for the chat template, as a mapping or as JSON.
        known: what an adapter, then what a fused adapter was trained with; the first that says something.
        tokenizer: for a question: it gets `chat` where there is a chat template.
        fallback: what stands in where nobody says anything; by default as `chosen_template`.

    Raises:
        ConfigError: an unknown name, a file that cannot be read, or variables for another template than chat.
    """
    given = json_option(kwargs, "chat_template_kwargs")
    found = wanted if isinstance(wanted, ChatTemplate) else wanted_template(wanted)
    earlier, chat = next(((name, how) for name, how in known if name or how != OWN), ("", OWN))
    if isinstance(found, ChatTemplate):
        name, chat = "chat", chat.changed(found.text, given, found.origin)
    else:
        name, chat = found or earlier, chat.changed("", given)
    if not name and tokenizer is not None and chat.text:
        name = "chat"
    name = name or fallback or chosen_template(tokenizer=tokenizer)
    _refuse_variables(given, name)
    return Asked(name, chat if name == "chat" else OWN)


def check(template: str | None) -> None:
    """ConfigError for the name of a template that does not exist; None is none."""
    if template is not None and template not in TEMPLATES:
        more = "" if "." not in template else "; a file of your own ends in .jinja"
        raise ConfigError(unknown("template", template, TEMPLATES) + more)


def default_template(form: str, tokenizer: Any = None) -> str:
    """The template for rows of a form when the user names none: the model's own, where it has one, since that
    is how it will be asked."""
    has_own = tokenizer is not None and tokenizer.has_chat_template
    if form == "messages" or (form != "text" and has_own):
        return "chat"
    return "alpaca" if form == "instruction" else "plain"


def chosen_template(*names: str | None, tokenizer: Any = None) -> str:
    """The first of `names` that is set: the user's template, then the adapter's, then a fused adapter's.

    Without any a question gets `chat` where its `tokenizer` has a chat template, else `plain`. A test set,
    for which no tokenizer is passed, gets `alpaca`, so that the numbers of all base models compare with the
    paper's.
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
    messages = question_of(instruction, input)
    if template == "plain":
        return messages[0]["content"]
    if template == "chat":
        return chat_prompt(messages, tokenizer)
    raise ConfigError(unknown("template", template, TEMPLATES))


def question_of(instruction: str, input: str = "") -> list[dict[str, str]]:
    """An instruction as the conversation that it begins."""
    return [{"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}]


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
    _refuse_variables(kwargs or {}, template)
    parts = []
    for message in messages:
        if message["role"] == "user":
            parts.append(prompt_for(message["content"], template=template, tokenizer=tokenizer, phase="eval"))
        else:
            parts.append(message["content"] + "\n\n")
    return "".join(parts)


def _refuse_variables(kwargs: Mapping[str, Any], template: str) -> None:
    """ConfigError for variables of a chat template that another template would not read."""
    if kwargs and template != "chat":
        raise ConfigError(
            f"chat_template_kwargs ({', '.join(kwargs)}) are read by the template chat, not by {template}"
        )


def render(row: dict[str, Any], fmt: str, *, template: str, tokenizer: Any) -> tuple[str, str]:
    """(prompt, completion) of one training row, by a template other than `chat`.

    `text` rows have no prompt. Raises DataError where the row does not fit the template.
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
    raise DataError(f"rows of messages need the template chat, found {template!r}: use --template chat")


def messages_of(row: dict[str, Any], fmt: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(the conversation of one training row, the variables it sets for the chat template).

    An instruction and a prompt are a question. Raises DataError for a `system` beside a system message.
    """
    if fmt != "messages":
        if fmt == "instruction":
            context = row.get("input") or ""
            question, answer = row["instruction"] + (f"\n\n{context}" if context else ""), row["output"]
        else:
            question, answer = row["prompt"], row["completion"]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], {}
    messages = list(row["messages"])
    if row.get("system"):
        if messages[0]["role"] == "system":
            raise DataError("field 'system' and a first message of the role system: keep one of the two")
        messages = [{"role": "system", "content": row["system"]}, *messages]
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return messages, {**(row.get("chat_template_kwargs") or {}), **tools}


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
