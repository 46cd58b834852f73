"""The one renderer of chat templates: exactly the text that transformers' `apply_chat_template` writes."""

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from itertools import groupby
from typing import Any

from mlx_adapters.errors import ConfigError, DataError

__all__ = ["Rendered", "assistant_marks", "chat_prompt", "chat_writer", "names", "unread", "written_at"]


class Rendered(str):
    """Text that a chat template wrote: every special token is in it, so encoding it adds none."""


TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


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
    if not TODAY.search(template):
        return {}
    written = TODAY.sub(lambda asked: json.dumps(moment.strftime(asked[2]), ensure_ascii=False), template)
    return {"chat_template": written}


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    answer: bool = True,
) -> Rendered:
    """What the tokenizer's chat template writes for `messages`, exactly as transformers renders it.

    `kwargs` are the template's own variables (`tools`, `enable_thinking`, ...): what is not given is that of
    `ChatTemplate.on`, else left to the template, and one that it does not read is refused. With `answer` the
    text ends where the answer begins. Raises ConfigError without a chat template, DataError where it refuses
    the messages.
    """
    if not tokenizer.has_chat_template:
        raise ConfigError(
            "this tokenizer has no chat template: use --template alpaca or plain, or data without messages"
        )
    from jinja2 import TemplateError

    if wrong := unread(kwargs or {}, tokenizer):
        raise DataError(wrong)
    kwargs = {**getattr(tokenizer, "chat_template_kwargs", {}), **(kwargs or {})}
    try:
        text: str = chat_writer(tokenizer)(
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
    unasked = getattr(tokenizer, "chat_prompt_unasked", "") if answer else ""
    return Rendered(text.removesuffix(unasked))


_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def assistant_marks(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, kwargs: Mapping[str, Any]
) -> list[tuple[int, int]] | None:
    """The parts that the template marks by `{% generation %}` in what it writes for `messages`, as (begin,
    end) in characters; None where it has no such marks.

    They are transformers' `return_assistant_tokens_mask`, so a token that is partly marked counts whole.
    """
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    if not getattr(inner, "is_fast", False) or not tokenizer.chat_template:
        return None
    if not _MARKS.search(tokenizer.get_chat_template(tools=kwargs.get("tools"))):
        return None
    found = chat_writer(tokenizer)(
        list(messages),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **_dated(tokenizer, kwargs.get("tools")),
        **{**getattr(tokenizer, "chat_template_kwargs", {}), **kwargs},
    )
    text = str(chat_prompt(messages, tokenizer, kwargs, answer=False))
    places = inner(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    pairs = zip(found["assistant_masks"], places, strict=True)
    runs = [list(run) for marked, run in groupby(pairs, key=lambda pair: pair[0]) if marked]
    return [(run[0][1][0], run[-1][1][1]) for run in runs]


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


def unread(kwargs: Mapping[str, Any], tokenizer: Any) -> str | None:
    """What is wrong with variables of which one is not the template's, or changes nothing since the template
    never names it; None where nothing is."""
    arguments = {*inspect.signature(chat_writer(tokenizer)).parameters} if kwargs else set()
    if wrong := sorted((arguments - {"tools", "documents", "args", "kwargs"}) & {*kwargs}):
        return f"chat_template_kwargs {wrong[0]!r} is not the template's: leave it out"
    if not kwargs or not tokenizer.chat_template:  # a renderer that is no template says itself what it takes
        return None
    source = tokenizer.get_chat_template(tools=kwargs.get("tools"))
    for name in kwargs:
        if not names(source, str(name)):
            return (
                f"{_named(tokenizer)}: its chat template does not read {name!r}, so it would change nothing: "
                "leave it out"
            )
    return None


def names(template: str, variable: str) -> bool:
    """Whether the text of a template has the name of a variable in it."""
    return bool(re.search(rf"\b{re.escape(variable)}\b", template))
