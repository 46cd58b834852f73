"""An answer as it is written: what `generate`, `chat` and `serve` read token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.generate.sampling import LogitsProcessor, Sampler

__all__ = ["Piece", "Text", "stream"]

_KEPT = 32  # tokens that are decoded again with each new one
_CHARACTER = 4  # tokens of one byte each that a character may have


@dataclass(frozen=True)
class Piece:
    """What a token adds to the text, maybe nothing; `tokens` counts it. The last piece has the `reason`."""

    text: str
    tokens: int
    reason: str | None = None


class Text:
    """The text of an answer behind its prompt, a token at a time.

    It is what transformers' `decode(prompt + answer, skip_special_tokens=True)` has after the prompt's text.
    An answer decoded alone loses the space before its first word where the tokenizer writes none at the start
    of a text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # what transformers cleans up (" ." to ".") is settled at the next space
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._ids = list(prompt)
        text = self._decode(self._ids)
        self._given = len(text)  # characters of the kept tokens' text that were handed out
        self._shorten(text)

    def add(self, token: int) -> str:
        """What can be read now. Half of a character waits for the rest."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        ready = max(self._given, text.rfind(" ") if self._cleans else len(text))
        new, self._given = text[self._given : ready], ready
        if len(self._ids) > 2 * _KEPT:
            self._shorten(text)
        return new

    def rest(self) -> str:
        """What was held back, at the end of the answer."""
        return self._decode(self._ids)[self._given :]

    def _shorten(self, text: str) -> None:
        """Keep the last tokens, from a place where their text is the end of the whole text."""
        held = len(text) - self._given
        for start in range(len(self._ids) - _KEPT - _CHARACTER, len(self._ids) - _KEPT):
            kept = self._ids[max(0, start) :]
            shorter = self._decode(kept)
            if shorter and text.endswith(shorter):
                self._ids, self._given = kept, len(shorter) - held
                return

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def stream(
    model: nn.Module,
    tokenizer: Any,
    unread: Sequence[int],
    *,
    prompt: Sequence[int],
    max_tokens: int,
    sampler: Sampler,
    processors: list[LogitsProcessor] | None = None,
    cache: list[Any] | None = None,
) -> Iterator[Piece]:
    """Answer a prompt with the model as it is, until one of `tokenizer.eos_token_ids` or `max_tokens`.

    `unread` are the ids the model has yet to read, virtual tokens included, and `prompt` the ids of the
    prompt's text. The pieces put together are the text of the answer.
    """
    from mlx_lm.generate import generate_step, generation_stream, wired_limit

    stop, text = frozenset(tokenizer.eos_token_ids), Text(tokenizer, prompt)
    steps = generate_step(
        mx.array(list(unread)),
        model,
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=processors,
        prompt_cache=cache,
    )
    with wired_limit(model, [generation_stream]):
        for count, (token, _) in enumerate(steps, start=1):
            if token in stop:
                yield Piece(text.rest(), count, "stop")
                return
            new = text.add(token)
            if count == max_tokens:
                yield Piece(new + text.rest(), count, "length")
                return
            yield Piece(new, count)
