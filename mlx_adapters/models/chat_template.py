"""The one renderer of chat templates: exactly the text that transformers' `apply_chat_template` writes."""

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from mlx_adapters.errors import ConfigError, DataError

__all__ = ["Rendered", "chat_prompt", "chat_writer", "written_at"]


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
