"""Greedy decoding of many prompts: batched, with a KV cache, stopping at the end-of-sequence token.

mlx-lm's `BatchGenerator` keeps the batch full (a finished row leaves at once and the next prompt takes its
place), so one long answer does not hold back the rest. Prompts go in longest first: neighbours have
similar lengths, hence little padding, and the largest batch (the one that may not fit) comes first.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_adapters.errors import ConfigError, DataError
from mlx_adapters.virtual import start_cache, with_virtual

__all__ = ["generate", "generate_ids"]


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 256,
    batch_size: int = 16,
) -> Iterator[tuple[int, str]]:
    """Yield `(index of the prompt, text)` for each prompt as it finishes, not in the order given.

    `tokenizer` is mlx-lm's wrapper: its `eos_token_ids` stop a row and are not part of the text.
    Raises DataError for an empty prompt, ConfigError for a limit below one.
    """
    stop = frozenset(int(token) for token in tokenizer.eos_token_ids)
    for index, ids in generate_ids(model, prompts, stop=stop, max_tokens=max_tokens, batch_size=batch_size):
        yield index, tokenizer.decode(ids, skip_special_tokens=True)


def generate_ids(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    stop: frozenset[int],
    max_tokens: int,
    batch_size: int,
) -> Iterator[tuple[int, list[int]]]:
    """`generate` in token ids; the stop token is left out."""
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {index} has no tokens: give every item an instruction")
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    training = model.training
    model.eval()  # adapter dropout would make answers random
    try:
        rows = [with_virtual(model, prompts[index]) for index in order]
        run = _batched if batch_size > 1 and _can_batch(model) else _one_by_one
        for position, ids in run(model, rows, stop=stop, max_tokens=max_tokens, batch_size=batch_size):
            yield order[position], ids
    finally:
        model.train(training)


def _can_batch(model: nn.Module) -> bool:
    """Whether each layer's cache has a batched form (state-space layers of some models have none)."""
    return all(hasattr(cache, "merge") for cache in make_prompt_cache(model))


def _batched(
    model: nn.Module, rows: list[list[int]], *, stop: frozenset[int], max_tokens: int, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    generator = BatchGenerator(
        model,
        max_tokens=max_tokens,
        stop_tokens=[[token] for token in sorted(stop)],
        sampler=_argmax,
        completion_batch_size=batch_size,
        prefill_batch_size=min(batch_size, 8),
    )
    try:
        # a prefix is a cache that starts full; each row needs its own, to grow by its own text
        caches = [start_cache(model) for _ in rows] if start_cache(model) is not None else None
        first = {uid: position for position, uid in enumerate(generator.insert(rows, caches=caches))}
        answers: list[list[int]] = [[] for _ in rows]
        left = len(rows)
        while left:
            for response in generator.next_generated():
                position = first[response.uid]
                if response.finish_reason != "stop":
                    answers[position].append(response.token)
                if response.finish_reason is not None:
                    left -= 1
                    yield position, answers[position]
    finally:
        generator.close()


def _one_by_one(
    model: nn.Module, rows: list[list[int]], *, stop: frozenset[int], max_tokens: int, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    for position, row in enumerate(rows):
        answer: list[int] = []
        steps = generate_step(
            mx.array(row), model, max_tokens=max_tokens, sampler=_argmax, prompt_cache=start_cache(model)
        )
        for token, _ in steps:
            if int(token) in stop:
                break
            answer.append(int(token))
        yield position, answer


def _argmax(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)
