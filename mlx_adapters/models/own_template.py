"""A chat template that is not the tokenizer's own, and the variables that chats are written with.

Every command writes chats with a tokenizer. `ChatTemplate.on` makes one that writes them in the way an
adapter was trained with, and ends answers where that closes a turn: nothing else has to know.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_adapters.errors import AdaptersError, CheckpointError, ConfigError, reading
from mlx_adapters.files.writing import write_whole
from mlx_adapters.models.chat_template import chat_writer, names, unread
from mlx_adapters.models.origin import recorded
from mlx_adapters.models.stop_tokens import turn_end

__all__ = [
    "FILE",
    "OWN",
    "ChatTemplate",
    "from_record",
    "fused",
    "read_template",
    "template_file",
]

FILE = "chat_template.jinja"
"""Where transformers looks for a chat template, in the folder of a tokenizer."""
_SEPARATORS = [part for part in (os.sep, os.altsep) if part]
_ENDINGS = (".jinja", ".jinja2", ".j2")


@dataclass(frozen=True)
class ChatTemplate:
    """How chats are written where a tokenizer alone would write them otherwise.

    Attributes:
        text: the Jinja text; empty for the tokenizer's own template.
        kwargs: the template's variables, as {"enable_thinking": False}.
        unasked: what a prompt leaves out at its end: a `<think>` that the generation prompt opens, but none
            of the answers that were trained.
        stops: the tokens that ended answers in training, {text: id}.
        origin: where the text was read, for errors.
    """

    text: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)
    unasked: str = ""
    stops: dict[str, int] = field(default_factory=dict)
    origin: str = field(default="", compare=False)

    def on(self, tokenizer: Any) -> Any:
        """A tokenizer that writes chats so; `tokenizer` itself where that changes nothing.

        Raises ConfigError for a text that is no template, or a variable that it does not read.
        """
        if not (self.text or self.kwargs or self.unasked):
            return tokenizer
        made = _copy(tokenizer)
        inner = vars(tokenizer).get("_tokenizer")
        # mlx-lm's wrapper hands on to the tokenizer of transformers, which has a `_tokenizer` too
        wrapped = hasattr(inner, "apply_chat_template")
        inner = _copy(inner) if wrapped else made
        if wrapped:
            vars(made)["_tokenizer"] = inner
        if self.text:
            inner.chat_template, inner.name_or_path = self.text, self.origin or FILE
            vars(made).update({"has_chat_template": True, "_chat_template": None})
            _check_syntax(made, self.origin or FILE)
            if (end := turn_end(made)) is not None:
                made.eos_token_ids = {*tokenizer.eos_token_ids, end}
        if wrong := unread(self.kwargs, made):
            raise ConfigError(wrong)
        inner.chat_template_kwargs, inner.chat_prompt_unasked = dict(self.kwargs), self.unasked
        return made

    def changed(self, text: str, kwargs: Mapping[str, Any], origin: str = "") -> "ChatTemplate":
        """With what a user asks for: `kwargs` win over the variables here; a `text` takes the place of the
        template, and of the variables here keeps those that it reads."""
        if not text:
            return replace(self, kwargs={**self.kwargs, **kwargs})
        kept = {name: value for name, value in self.kwargs.items() if names(text, name)}
        return ChatTemplate(text, {**kept, **kwargs}, origin=origin)

    @property
    def digest(self) -> str:
        """A short hash of the text; empty without one."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16] if self.text else ""

    @property
    def identity(self) -> dict[str, str]:
        """What a run that is resumed must share."""
        return {"chat_template": self.digest, "chat_template_kwargs": json.dumps(self.kwargs, sort_keys=True)}

    def record(self) -> dict[str, Any]:
        """What is stored beside the text, as JSON values; empty where there is nothing to say."""
        return {name: value for name in ("kwargs", "unasked", "stops") if (value := getattr(self, name))}

    def store(self, folder: Path) -> None:
        """Write the text to the file in `folder` that transformers reads; without one, no text of another
        adapter stays there. That of a tokenizer in the same folder does."""
        if self.text:
            write_whole(folder / FILE, self.text)
        elif not (folder / "tokenizer_config.json").exists():
            (folder / FILE).unlink(missing_ok=True)


OWN = ChatTemplate()
"""The tokenizer's own template, without a variable."""


def from_record(record: Any, text: str = "", origin: str = "") -> ChatTemplate:
    """The chat template of `text` with what `ChatTemplate.record` had returned; TypeError for others."""
    made = ChatTemplate(text, **({} if record is None else record), origin=origin)
    if not (isinstance(made.kwargs, dict) and isinstance(made.unasked, str) and isinstance(made.stops, dict)):
        raise TypeError("chat: not an object of kwargs, unasked and stops")
    return made


def fused(config: dict[str, Any]) -> ChatTemplate:
    """What a model's config remembers of the adapter that was fused into it. CheckpointError if damaged."""
    with reading(Path("config.json"), CheckpointError):
        return from_record(recorded(config).get("chat"))


def template_file(name: str) -> Path | None:
    """The file that a template's `name` means: one that ends in .jinja, .jinja2 or .j2, or a path with a
    separator that exists. A file called `alpaca` is not meant by that word."""
    path = Path(name)
    named = name.endswith(_ENDINGS) or (any(part in name for part in _SEPARATORS) and path.is_file())
    return path if named else None


def read_template(file: Path, kind: type[AdaptersError] = ConfigError) -> str:
    """The text of a template's file; `kind` where there is none, or nothing in it."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise kind(f"{file}: no such file. Give a chat template in Jinja") from None
    except (OSError, ValueError) as error:
        raise kind(f"{file}: cannot be read as a chat template ({error})") from None
    if not text.strip():
        raise kind(f"{file}: is empty, so no message would be written")
    return text


def _check_syntax(tokenizer: Any, origin: str) -> None:
    """ConfigError, with the line, for a text that is not Jinja. It is run in transformers' sandbox alone."""
    from jinja2 import TemplateSyntaxError

    try:
        chat_writer(tokenizer)([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(f"{origin}: line {error.lineno}: is no Jinja template ({error.message})") from None
    except Exception:  # what it says to these messages is asked with the user's own
        return


def _copy(made: Any) -> Any:
    """Another object of the same attributes; the vocabulary is shared."""
    other = object.__new__(type(made))
    vars(other).update(vars(made))
    return other
