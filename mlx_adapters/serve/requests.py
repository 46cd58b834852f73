"""What a request asks: fields of OpenAI's API, checked. One that would change the answer and is unknown here
is refused, not ignored."""

import json
from dataclasses import dataclass
from typing import Any

from mlx_adapters.parse import from_json

__all__ = ["Ask", "Message", "RequestError", "parse"]

Message = dict[str, str]

_ROLES = ("system", "developer", "user", "assistant")
_SEEDS = 2**31
_STOPS = 4  # OpenAI's own limit
# Fields whose other values would change the answer: refused, not ignored.
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}


class RequestError(Exception):
    """A request that cannot be answered: the HTTP status, one line, and the field at fault."""

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field, self.code = status, field, code


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A checked request. `prompt` is read as it is, `messages` through a template; one of them is given."""

    model: str
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False

    @property
    def chat(self) -> bool:
        """Whether the question is a conversation."""
        return self.prompt is None


def parse(body: bytes, *, chat: bool, max_tokens: int) -> Ask:
    """The request in `body`; RequestError says what is wrong with it.

    `max_tokens` is the longest answer the server gives, and the one when nothing is asked (at most 256).
    The temperature is 0 unless given, as in `mlx-adapters generate`; OpenAI's would be 1.
    """
    fields = _object(body)
    for name, allowed in _ONLY.items():
        if fields.get(name) not in (None, *allowed):
            raise RequestError(400, f"{name} is not supported here: leave it out", name)
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise RequestError(
            400, "model must be the name of the base or of an adapter: GET /v1/models", "model"
        )
    limit_name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    options = fields.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise RequestError(400, "stream_options must be an object", "stream_options")
    return Ask(
        model=model,
        prompt=None if chat else _prompt(fields.get("prompt")),
        messages=_messages(fields.get("messages")) if chat else (),
        max_tokens=int(_number(fields, limit_name, min(256, max_tokens), 1, max_tokens, whole=True)),
        temperature=_number(fields, "temperature", 0.0, 0.0, 2.0),
        top_p=_number(fields, "top_p", 1.0, 1e-6, 1.0),
        seed=int(_number(fields, "seed", 0, 0, _SEEDS - 1, whole=True)),
        stop=_stop(fields.get("stop")),
        stream=_flag(fields, "stream"),
        include_usage=_flag(options or {}, "include_usage"),
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = from_json(body.decode("utf-8"))
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise RequestError(400, f"the body must be a JSON object, found {type(fields).__name__}")
    return fields


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
        text = _clean(_content(message.get("content"), where), f"{where}.content")
        found.append({"role": "system" if role == "developer" else role, "content": text})
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
            400, f"{where} holds half of a surrogate pair: it is no valid text", where
        ) from None
    return text


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "..."
