"""Decoding of many prompts: batched, with a KV cache, stopping at the end-of-sequence token.

The batch is kept full (continuous.py), so one long answer does not hold back the rest. Prompts go in longest
first: neighbours have similar lengths, hence little padding, and the largest batch (the one that may not fit)
comes first. What all prompts begin with, the template, is read once.

The paper sets temperature 0.1, top_p 0.75, top_k 40 and four beams, but leaves sampling off: its numbers are
plain beam search. `beam` is that, `sample` is what the settings say, `greedy` is the default.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from mlx_adapters import device
from mlx_adapters.adapter.call import all_with_virtual, before_text, start_cache
from mlx_adapters.errors import ConfigError, DataError, unknown
from mlx_adapters.generate.batching import Sampler, answer_many
from mlx_adapters.generate.beam import beam_search
from mlx_adapters.generate.prefill import rows_that_fit, splits
from mlx_adapters.generate.sampling import sampler
from mlx_adapters.models.limits import check_ids, check_length

__all__ = ["DECODINGS", "Decoding", "generate", "generate_ids"]

DECODINGS = ("greedy", "beam", "sample")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are decoded; the defaults are the paper's settings. `seed` makes samples repeatable, the
    same for a prompt whatever is decoded with it."""

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


GREEDY = Decoding()


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 256,
    batch_size: int | None = None,
    decoding: Decoding = GREEDY,
    keys: Sequence[int] | None = None,
) -> Iterator[tuple[int, str]]:
    """Yield `(index of the prompt, text)` for each prompt as it finishes, not in the order given.

    `tokenizer` is mlx-lm's wrapper: its `eos_token_ids` stop a row and are not part of the text.
    `batch_size` rows go together, by default as many as memory allows, of which a prompt takes as many as
    there are beams. `keys` are the prompts' numbers for sampling, by default their places.
    Raises DataError for an empty prompt, ConfigError for a limit below one, CheckpointError for a token and
    UnsupportedError for a length that the model does not have.
    """
    stop = frozenset(int(token) for token in tokenizer.eos_token_ids)
    check_ids(model, prompts, tokenizer)
    options: dict[str, Any] = {"max_tokens": max_tokens, "batch_size": batch_size, "decoding": decoding}
    for index, ids in generate_ids(model, prompts, stop=stop, keys=keys, **options):
        yield index, tokenizer.decode(ids, skip_special_tokens=True)


def generate_ids(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    stop: frozenset[int],
    max_tokens: int,
    batch_size: int | None = None,
    decoding: Decoding = GREEDY,
    keys: Sequence[int] | None = None,
    until: Callable[[int, list[int]], bool] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """`generate` in token ids; the stop token is left out. An answer also ends, with that token, where
    `until(index of the prompt, its tokens)` says so; beam search does not ask."""
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {index} has no tokens: give every item an instruction")
    device.prepare_memory()
    training = model.training
    model.eval()  # adapter dropout would make answers random
    try:
        rows = all_with_virtual(model, prompts)
        check_length(model, max(map(len, prompts), default=0) + before_text(model), max_tokens)
        if batch_size is None:
            batch_size = rows_that_fit(model, max(map(len, rows), default=1), max_tokens)
        if decoding.kind == "beam":
            yield from beam_search(
                model,
                prompts,
                stop=stop,
                max_tokens=max_tokens,
                beams=decoding.beams,
                length_penalty=decoding.length_penalty,
                batch_size=max(1, batch_size // decoding.beams),
            )
            return
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        samplers = None
        if decoding.kind == "sample":
            samplers = [_sampler(decoding, keys[index] if keys else index) for index in order]
        run = answer_many if batch_size > 1 and splits(model) else _one_by_one
        ended = (lambda position, ids: until(order[position], ids)) if until else None
        limits: dict[str, Any] = {"stop": stop, "ended": ended, "max_tokens": max_tokens}
        ordered = [rows[index] for index in order]
        for position, ids in run(model, ordered, samplers, width=batch_size, **limits):
            yield order[position], ids
    finally:
        model.train(training)


def _one_by_one(
    model: nn.Module,
    rows: list[list[int]],
    samplers: list[Sampler] | None,
    *,
    stop: frozenset[int],
    ended: Callable[[int, list[int]], bool] | None,
    max_tokens: int,
    width: int,
) -> Iterator[tuple[int, list[int]]]:
    for position, row in enumerate(rows):
        answer: list[int] = []
        draw = samplers[position] if samplers else None
        steps = generate_step(
            mx.array(row), model, max_tokens=max_tokens, sampler=draw, prompt_cache=start_cache(model)
        )
        for token, _ in steps:
            if int(token) in stop:
                break
            answer.append(int(token))
            if ended and ended(position, answer):
                break
        yield position, answer


def _sampler(decoding: Decoding, number: int) -> Sampler:
    """The draws of the prompt of that number, whatever is decoded with it."""
    return sampler(
        (decoding.seed << 32) + number,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        top_k=decoding.top_k,
    )
