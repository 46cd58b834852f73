"""An answer token by token: what `generate`, `chat` and `serve` read."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_adapters.generate.sampling import LogitsProcessor, Sampler

__all__ = ["Delta", "Detokenizer", "stream_tokens"]

_CONTEXT = 32  # tokens that are decoded again with each new one
_CHARACTER = 4  # tokens of one byte each that a character may have


@dataclass(frozen=True)
class Delta:
    """What a token adds to the text, maybe nothing; `tokens` counts the tokens so far. The last delta has the
    reason: `stop` or `length`."""

    text: str
    tokens: int = 0
    reason: str | None = None
    prompt_tokens: int = 0


class Detokenizer:
    """Turns the tokens of an answer into text, one at a time.

    The text is what transformers' `decode(prompt + answer, skip_special_tokens=True)` has after the prompt's
    text. An answer decoded alone loses the space before its first word where the tokenizer writes none at the
    start of a text.
    """

    def __init__(self, tokenizer: TokenizerWrapper, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # what transformers cleans up (" ." to ".") is settled at the next space
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._ids = list(prompt)
        text = self._decode(self._ids)
        self._returned = len(text)  # characters of the context's text that were returned
        self._shorten(text)

    def add(self, token: int) -> str:
        """The text that is complete now. Half of a character waits for the rest."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        ready = max(self._returned, text.rfind(" ") if self._cleans else len(text))
        new, self._returned = text[self._returned : ready], ready
        if len(self._ids) > 2 * _CONTEXT:
            self._shorten(text)
        return new

    def rest(self) -> str:
        """The text that still waited, at the end of the answer."""
        return self._decode(self._ids)[self._returned :]

    def _shorten(self, text: str) -> None:
        """Drop old tokens, up to a place where the text of the others is the end of the whole text."""
        waiting = len(text) - self._returned
        for start in range(len(self._ids) - _CONTEXT - _CHARACTER, len(self._ids) - _CONTEXT):
            last = self._ids[max(0, start) :]
            shorter = self._decode(last)
            if shorter and text.endswith(shorter):
                self._ids, self._returned = last, len(shorter) - waiting
                return

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def stream_tokens(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    unread: Sequence[int],
    *,
    prompt: Sequence[int],
    max_tokens: int,
    sampler: Sampler,
    processors: list[LogitsProcessor] | None = None,
    cache: list[Any] | None = None,
) -> Generator[Delta]:
    """Answer a prompt with the model as it is, until one of `tokenizer.eos_token_ids` or `max_tokens`.

    `unread` are the ids that `cache` does not have yet, virtual tokens included, and `prompt` the ids of the
    prompt's text. The deltas joined are the text of the answer.
    """
    from mlx_lm.generate import generate_step, generation_stream, wired_limit

    stop, text = frozenset(tokenizer.eos_token_ids), Detokenizer(tokenizer, prompt)
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
                yield Delta(text.rest(), count, "stop")
                return
            new = text.add(token)
            if count == max_tokens:
                yield Delta(new + text.rest(), count, "length")
                return
            yield Delta(new, count)
