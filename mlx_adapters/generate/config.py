"""How a prompt is answered, declared once: options of `generate` and `chat`.

Imports nothing heavy: the command line reads the declarations before it knows whether MLX is needed.
"""

from dataclasses import asdict, dataclass
from typing import Any

from mlx_adapters.errors import ConfigError
from mlx_adapters.fields import field
from mlx_adapters.files.documents import json_option

__all__ = ["AnswerConfig"]


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """The arguments of `generate` and `Conversation` that say how an answer is drawn."""

    system: str | None = field(None, "a system message in front of the conversation", "system_prompt")
    template: str | None = field(
        None,
        "prompt template, or a FILE.jinja [default: the adapter's, else chat if there is one, else plain]",
    )
    chat_template_kwargs: str | None = field(
        None, """chat template variables: '{"enable_thinking": false}' [default: the adapter's]"""
    )
    max_tokens: int = field(512, "longest answer", "max_new_tokens")
    temperature: float = field(0.0, "0 takes the most likely token", "temp")
    top_p: float = field(1.0, "draw from the fewest tokens that together have this probability")
    top_k: int = field(0, "draw from the K likeliest tokens; 0: from all")
    min_p: float = field(0.0, "draw from tokens with at least this share of the likeliest one's probability")
    seed: int | None = field(None, "makes draws repeatable [default: new draws each time]")

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be {least} or more" for name, least in _LEAST.items() if getattr(self, name) < least
        ]
        problems += [
            f"{name}={getattr(self, name)} must be at most 1"
            for name in ("top_p", "min_p")
            if getattr(self, name) > 1
        ]
        json_option(self.chat_template_kwargs, "--chat-template-kwargs")
        if problems:
            raise ConfigError("; ".join(problems))

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `generate`."""
        return asdict(self)


_LEAST = {"max_tokens": 1, "temperature": 0, "top_p": 0, "top_k": 0, "min_p": 0}
