"""What a request asks: fields of OpenAI's API, and some that vLLM and mlx-lm add, checked. A field that is
not known here is refused by its name, unless it cannot change the answer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_adapters.files.documents import from_json

__all__ = ["CompletionRequest", "Message", "RequestError", "parse"]

Message = dict[str, str]

_ROLES = ("system", "developer", "user", "assistant")
_SEEDS = 2**31
_STOPS = 4  # OpenAI's own limit
_USED = frozenset(
    [
        "model",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "stream",
        "stream_options",
    ]
)
_ONE_OF = {True: ("messages", "chat_template_kwargs"), False: ("prompt",)}  # of a chat, of a completion
# Fields whose other values would change the answer.
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# Fields about the client, about storage and about speed, which do not change the answer.
_ASIDE = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
    ]
)
_NOTHING: tuple[Any, ...] = (None, "", [], {})


class RequestError(Exception):
    """A request that cannot be answered: the HTTP status, one line, and the field at fault."""

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field, self.code = status, field, code


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A checked request. `prompt` is read as it is, `messages` through a template; one of them is given.

    `top_k` 0 keeps all tokens; without a `seed` every answer has new draws.
    """

    model: str
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False

    @property
    def chat(self) -> bool:
        """Whether the question is a conversation."""
        return self.prompt is None


def parse(body: bytes, *, chat: bool, max_tokens: int) -> CompletionRequest:
    """The request in `body`; RequestError says what is wrong with it.

    `max_tokens` is the server's limit; a request that sets none gets at most 256.
    The temperature is 0 unless given, as in `mlx-adapters generate`; OpenAI's would be 1.
    """
    fields = _object(body)
    _refuse_others(fields, chat)
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise RequestError(
            400, "model must be the name of the base or of an adapter: GET /v1/models", "model"
        )
    limit_name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    options, seed = _object_field(fields, "stream_options"), fields.get("seed")
    return CompletionRequest(
        model=model,
        prompt=None if chat else _prompt(fields.get("prompt")),
        messages=_messages(fields.get("messages")) if chat else (),
        max_tokens=int(_number(fields, limit_name, min(256, max_tokens), 1, max_tokens, whole=True)),
        temperature=_number(fields, "temperature", 0.0, 0.0, 2.0),
        top_p=_number(fields, "top_p", 1.0, 1e-6, 1.0),
        top_k=max(0, int(_number(fields, "top_k", 0, -1, _SEEDS, whole=True))),  # -1: all, as in vLLM
        min_p=_number(fields, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=_number(fields, "repetition_penalty", 1.0, 0.01, 100.0),
        presence_penalty=_number(fields, "presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=_number(fields, "frequency_penalty", 0.0, -2.0, 2.0),
        seed=None if seed is None else int(_number(fields, "seed", 0, 0, _SEEDS - 1, whole=True)),
        template_kwargs=_object_field(fields, "chat_template_kwargs"),
        stop=_stop(fields.get("stop")),
        stream=_flag(fields, "stream"),
        include_usage=_flag(options, "include_usage"),
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = from_json(body.decode("utf-8"))
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise RequestError(400, f"the body must be a JSON object, found {type(fields).__name__}")
    return fields


def _refuse_others(fields: dict[str, Any], chat: bool) -> None:
    for name, value in fields.items():
        if value is None or name in _USED or name in _ONE_OF[chat] or name in _ASIDE:
            continue
        if not any(type(value) is type(allowed) and value == allowed for allowed in _ONLY.get(name, ())):
            raise RequestError(400, f"{name[:80]} is not supported here: leave it out", name[:80])


def _object_field(fields: dict[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise RequestError(400, f"{name} must be an object, found {_short(value)}", name)
    _clean(json.dumps(value, ensure_ascii=False), name)
    return value or {}


def _number(
    fields: dict[str, Any], name: str, default: float, least: float, most: float, *, whole: bool = False
) -> float:
    value = fields.get(name)
    if value is None:
        return default
    right = isinstance(value, int) if whole else isinstance(value, (int, float))
    if not right or isinstance(value, bool) or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        bounds = f"{least:g} to {most:g}" if not whole else f"{least} to {most}"
        raise RequestError(400, f"{name} must be {kind} from {bounds}, found {_short(value)}", name)
    return value


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(400, f"{name} must be true or false, found {_short(value)}", name)
    return bool(value)


def _stop(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(found, list) or len(found) > _STOPS or not all(isinstance(s, str) and s for s in found):
        raise RequestError(400, f"stop must be a text, or a list of up to {_STOPS} texts, none empty", "stop")
    return tuple(found)


def _prompt(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not value:
        raise RequestError(400, "prompt must be one text that is not empty; one request asks one", "prompt")
    return _clean(value, "prompt")


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RequestError(400, "messages must be a list of at least one message", "messages")
    found = []
    for index, message in enumerate(value):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise RequestError(400, f"{where} must be an object with role and content", where)
        role = message.get("role")
        if role not in _ROLES:
            raise RequestError(
                400, f"{where}.role must be one of {', '.join(_ROLES)}, found {_short(role)}", f"{where}.role"
            )
        for name, value in message.items():
            if name not in ("role", "content", "name") and value not in _NOTHING:
                raise RequestError(400, f"{where}.{name[:80]} is not supported here: leave it out", where)
        text = _clean(_content(message.get("content"), where), f"{where}.content")
        found.append({"role": "system" if role == "developer" else role, "content": text})
        if message.get("name"):  # a template may write it
            found[-1]["name"] = _clean(_content(message["name"], where), f"{where}.name")
    if found[-1]["role"] != "user":
        raise RequestError(400, "the last of the messages must be the user's", "messages")
    return tuple(found)


def _content(value: Any, where: str) -> str:
    """A text, or the API's list of parts when all of them are text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in value
    ):
        return "".join(part["text"] for part in value)
    raise RequestError(400, f"{where}.content must be text", f"{where}.content")


def _clean(text: str, where: str) -> str:
    """JSON can spell half a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(
            400, f"{where} holds half of a surrogate pair: it is not valid text", where
        ) from None
    return text


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "..."
