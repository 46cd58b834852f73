"""Decoding of many prompts: batched, with a KV cache, stopping at the end-of-sequence token.

The batch is kept full (batching.py), so one long answer does not hold back the rest. Prompts go in longest
first: neighbours have similar lengths, hence little padding, and the largest batch (the one that may not fit)
comes first. What all prompts begin with, the template, is computed once.

The paper sets temperature 0.1, top_p 0.75, top_k 40 and four beams, but leaves sampling off: its numbers are
plain beam search. `beam` is that, `sample` is what the settings say, `greedy` is the default.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_adapters import device
from mlx_adapters.adapter.call import all_with_virtual, before_text, start_cache
from mlx_adapters.errors import ConfigError, DataError, unknown
from mlx_adapters.generate.batching import answer_many
from mlx_adapters.generate.beam import beam_search
from mlx_adapters.generate.prefill import Prompts, by_index, longest_first, rows_that_fit, splits
from mlx_adapters.generate.sampling import Sampler, sampler
from mlx_adapters.models.limits import check_ids, check_length

__all__ = ["DECODINGS", "GREEDY", "Decoding", "generate_ids", "generate_texts"]

DECODINGS = ("greedy", "beam", "sample")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are decoded; the defaults are the paper's settings. `seed` makes samples repeatable: the
    draws of a prompt depend on the seed and its index, not on what is decoded beside it."""

    kind: str = "greedy"
    beams: int = 4
    length_penalty: float = 1.0
    temperature: float = 0.1
    top_p: float = 0.75
    top_k: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in DECODINGS:
            raise ConfigError(unknown("decoding", self.kind, DECODINGS))
        if self.beams < 1 or self.top_k < 1 or self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"decoding: beams and top_k must be at least 1, temperature above 0, top_p in (0, 1]; found "
                f"beams {self.beams}, top_k {self.top_k}, temperature {self.temperature}, top_p {self.top_p}"
            )

    def sampler(self, index: int) -> Sampler:
        """The draws of the prompt with that index."""
        seed = (self.seed << 32) + index
        return sampler(seed, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)


GREEDY = Decoding()


def generate_texts(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Prompts,
    *,
    max_tokens: int = 256,
    batch_size: int | None = None,
    decoding: Decoding = GREEDY,
) -> Iterator[tuple[int, str]]:
    """Answer many prompts at once; yield `(index, text)` as each is done, not in the order of the prompts.

    Args:
        model: the model, with its adapter if it has one.
        tokenizer: mlx-lm's wrapper; its `eos_token_ids` end an answer and are not part of the text.
        prompts: token ids by index.
        max_tokens: the longest answer.
        batch_size: rows that are decoded together, by default as many as memory allows. A prompt takes as
            many rows as there are beams.
        decoding: greedy, beam search or sampling.

    Raises:
        DataError: a prompt without tokens.
        ConfigError: a limit below one.
        CheckpointError: a token that the model does not have.
        UnsupportedError: a text longer than the model's positions.
    """
    stop = frozenset(int(token) for token in tokenizer.eos_token_ids)
    check_ids(model, by_index(prompts).values(), tokenizer)
    options: dict[str, Any] = {"max_tokens": max_tokens, "batch_size": batch_size, "decoding": decoding}
    for index, ids in generate_ids(model, prompts, stop=stop, **options):
        yield index, _text(tokenizer, ids)


def _text(tokenizer: TokenizerWrapper, ids: list[int]) -> str:
    """The text of an answer, without special tokens but the one that ends a thought: what is read as the
    answer begins there."""
    end = list(getattr(tokenizer, "think_end_tokens", None) or ())
    for start in range(len(ids) - len(end), -1, -1) if end else ():
        if ids[start : start + len(end)] == end:
            thought = tokenizer.decode(ids[:start], skip_special_tokens=True)
            rest = tokenizer.decode(ids[start + len(end) :], skip_special_tokens=True)
            return f"{thought}{tokenizer.think_end}{rest}"
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def generate_ids(
    model: nn.Module,
    prompts: Prompts,
    *,
    stop: frozenset[int],
    max_tokens: int,
    batch_size: int | None = None,
    decoding: Decoding = GREEDY,
    until: Callable[[int, list[int]], bool] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """`generate_texts` in token ids; a token of `stop` is left out. An answer also ends, with its last token,
    where `until(index, answer)` is true; beam search does not ask."""
    prompts = by_index(prompts)
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    for index, prompt in prompts.items():
        if not prompt:
            raise DataError(f"prompt {index} has no tokens: give every item an instruction")
    device.prepare_memory()
    training = model.training
    model.eval()  # adapter dropout would make answers random
    try:
        rows = dict(zip(prompts, all_with_virtual(model, prompts.values())))
        longest = max(map(len, prompts.values()), default=0)
        check_length(model, longest + before_text(model), max_tokens)
        if batch_size is None:
            batch_size = rows_that_fit(model, max(map(len, rows.values()), default=1), max_tokens)
        if decoding.kind == "beam":
            beams = {"beams": decoding.beams, "batch_size": max(1, batch_size // decoding.beams)}
            penalty = decoding.length_penalty
            yield from beam_search(
                model, prompts, stop=stop, max_tokens=max_tokens, length_penalty=penalty, **beams
            )
            return
        run = answer_many if batch_size > 1 and splits(model) else _one_by_one
        draws = decoding.sampler if decoding.kind == "sample" else None
        yield from run(model, rows, draws, stop=stop, until=until, max_tokens=max_tokens, width=batch_size)
    finally:
        model.train(training)


def _one_by_one(
    model: nn.Module,
    rows: Mapping[int, Sequence[int]],
    samplers: Callable[[int], Sampler] | None,
    *,
    stop: frozenset[int],
    until: Callable[[int, list[int]], bool] | None,
    max_tokens: int,
    width: int,
) -> Iterator[tuple[int, list[int]]]:
    """`answer_many` for models whose caches do not hold several rows of different lengths."""
    for index in longest_first(rows):
        answer: list[int] = []
        steps = generate_step(
            mx.array(list(rows[index])),
            model,
            max_tokens=max_tokens,
            sampler=samplers(index) if samplers else None,
            prompt_cache=start_cache(model),
        )
        for token, _ in steps:
            if int(token) in stop:
                break
            answer.append(int(token))
            if until and until(index, answer):
                break
        yield index, answer
