"""How the next token is drawn: one sampler for `eval`, `generate`, `chat` and `serve`, with a key of its own.

MLX's global random state is not used: what is decoded beside a request would change its draws.
"""

import math
import secrets
from collections.abc import Callable

import mlx.core as mx

__all__ = ["LogitsProcessor", "Sampler", "fresh_seed", "greedy", "penalties", "sampler"]

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


def fresh_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbits(62)


def greedy(logprobs: mx.array) -> mx.array:
    """The most likely token."""
    return mx.argmax(logprobs, axis=-1)


def sampler(
    seed: int, *, temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> Sampler:
    """Draws of log probabilities [..., vocabulary]; temperature 0 is greedy.

    In transformers' order: temperature, then the `top_k` likeliest (0: all), of these the fewest that have
    `top_p` of the probability, of these what has at least `min_p` times that of the likeliest.
    """
    if temperature == 0:
        return greedy
    key = mx.random.key(seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        count, best = logprobs.shape[-1], None
        scaled = logprobs.astype(mx.float32) / temperature
        if 0 < top_k < count:
            best = mx.argpartition(-scaled, top_k - 1, axis=-1)[..., :top_k]
            scaled = mx.take_along_axis(scaled, best, axis=-1)
        if top_p < 1:
            order = mx.argsort(-scaled, axis=-1)
            best = order if best is None else mx.take_along_axis(best, order, axis=-1)
            scaled = mx.take_along_axis(scaled, order, axis=-1)
            share = mx.softmax(scaled, axis=-1)
            before = mx.cumsum(share, axis=-1) - share
            scaled = mx.where((before < top_p) | (before == 0), scaled, -mx.inf)  # the likeliest always stays
        if min_p > 0:
            least = mx.max(scaled, axis=-1, keepdims=True) + math.log(min_p)
            scaled = mx.where(scaled < least, -mx.inf, scaled)
        drawn = mx.random.categorical(scaled, key=now)
        return drawn if best is None else mx.take_along_axis(best, drawn[..., None], axis=-1)[..., 0]

    return sample


def penalties(
    prompt: list[int],
    read: int,
    *,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
) -> list[LogitsProcessor]:
    """What is done to the logits before a token is chosen, for mlx-lm's `generate_step`.

    `repetition` divides the positive logits of every token of `prompt` and of the answer and multiplies the
    negative ones, as transformers' `repetition_penalty`. From the logits of the answer's tokens `presence` is
    subtracted once and `frequency` for each time, as OpenAI defines them. `read` is the number of ids that
    the model reads before the answer.
    """
    if repetition == 1 and presence == 0 and frequency == 0:
        return []

    asked = mx.array(prompt, mx.int32)

    def apply(tokens: mx.array, logits: mx.array) -> mx.array:
        answer = tokens[read:].astype(mx.int32)
        if repetition != 1:
            seen = mx.zeros(logits.shape[-1], mx.bool_)
            seen[mx.concatenate([asked, answer])] = True
            logits = mx.where(seen, mx.where(logits < 0, logits * repetition, logits / repetition), logits)
        if answer.size and (presence or frequency):
            counts = mx.zeros(logits.shape[-1], logits.dtype).at[answer].add(1)
            logits = logits - frequency * counts - presence * (counts > 0).astype(logits.dtype)
        return logits

    return [apply]
