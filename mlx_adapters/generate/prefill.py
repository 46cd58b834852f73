"""Read prompts into a KV cache: once, batched, with whatever the adapter puts in front."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache, KVCache, RotatingKVCache, make_prompt_cache

from mlx_adapters import device
from mlx_adapters.adapter.call import close, start_cache

__all__ = [
    "Prefix",
    "common_prefix",
    "fill",
    "leaves_window",
    "logprobs",
    "prefill",
    "read",
    "reorder",
    "right_padded",
    "rows_that_fit",
    "shared_prefix",
    "splits",
]

_CHUNK = 2048  # of a long prompt, this many tokens are read at once
_WORTH = 8  # a shorter prefix saves less than copying its cache costs
_MOST = 64  # rows
_READ = 4096  # prompt tokens that are read together, padding among them
_SIMILAR = 0.85  # of the longest prompt's length, what one that is read with it has at least


def splits(model: nn.Module) -> bool:
    """Whether rows of different lengths can share a cache: tried once per model, by what each row has alone.

    Some state-space layers' caches have no batched form, others take padding into their state, and mlx-lm's
    code for a few models does not take a mask for each row (gpt_bigcode, and gemma2 as mlx-lm has it).
    """
    known: bool | None = getattr(model, "_splits", None)
    if known is None:
        try:
            known = _reads_rows_apart(model)
        except (ValueError, TypeError, AttributeError, NotImplementedError):
            known = False
        model._splits = known
    return known


def _reads_rows_apart(model: nn.Module) -> bool:
    """Two rows, read in a padded batch and one token on, against each alone."""
    rows, after = [[1, 2, 3, 4, 3, 2, 1, 2, 4, 1, 3, 2], [4, 3, 1]], [[4], [2]]
    _, cache = prefill(model, rows)
    found = model(mx.array(after), cache=cache)
    for number, (row, token) in enumerate(zip(rows, after)):
        own = start_cache(model) or make_prompt_cache(model)
        model(mx.array([row]), cache=own)
        if not close(found[number : number + 1], model(mx.array([token]), cache=own)):
            return False
    return True


def leaves_window(model: nn.Module, tokens: int) -> bool:
    """Whether a row of so many tokens is longer than what some layer keeps of it.

    mlx-lm's batched cache of such a layer goes on by single tokens only: of several at once it masks others.
    """
    cache = start_cache(model) or make_prompt_cache(model)
    return any(isinstance(layer, RotatingKVCache) and tokens > layer.max_size for layer in cache)


@dataclass(frozen=True)
class Prefix:
    """The first `length` tokens of all rows (virtual tokens among them), read once."""

    length: int
    states: list[tuple[mx.array, mx.array]]

    def cache(self) -> list[Any]:
        """A cache for one row, which goes on after the prefix."""
        caches = []
        for keys, values in self.states:
            cache = KVCache()
            # without room to grow: growing copies, so rows may share the arrays
            cache.keys, cache.values, cache.offset = keys, values, keys.shape[2]
            caches.append(cache)
        return caches


def shared_prefix(model: nn.Module, rows: Sequence[Sequence[int]]) -> Prefix | None:
    """What all rows begin with, read into a cache; None where it would not pay, or cannot go on in many rows.

    `rows` have their virtual tokens. The template and the task's phrases make a third of a short prompt.
    """
    length = common_prefix(rows)
    cache = start_cache(model) or make_prompt_cache(model)
    if len(rows) < 2 or length < _WORTH or not all(type(layer) is KVCache for layer in cache):
        return None
    model(mx.array([rows[0][:length]]), cache=cache)
    states = [(c.keys[..., : c.offset, :], c.values[..., : c.offset, :]) for c in cache]
    states = [(mx.contiguous(keys), mx.contiguous(values)) for keys, values in states]
    mx.eval(states)
    return Prefix(length, states)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, at least one of each row left over."""
    if not rows:
        return 0
    first, last = min(map(list, rows)), max(map(list, rows))  # all others lie between these two
    limit = min(len(row) for row in rows) - 1
    return next((i for i in range(limit) if first[i] != last[i]), max(limit, 0))


def prefill(
    model: nn.Module, rows: Sequence[Sequence[int]], prefix: Prefix | None = None
) -> tuple[mx.array, list[Any]]:
    """(logits after each row [rows, vocabulary], the cache of all rows in batched form).

    `rows` are of any length and have their virtual tokens; those of `prefix` are not read again. Needs
    `splits(model)`.
    """
    cache = read(model, rows, prefix)
    return model(mx.array([[row[-1]] for row in rows]), cache=cache)[:, -1], cache


def read(model: nn.Module, rows: Sequence[Sequence[int]], prefix: Prefix | None = None) -> list[Any]:
    """The cache of all rows in batched form, after all their tokens but the last.

    `rows` have their virtual tokens; those of `prefix` are not read again.
    """
    if prefix is None:
        # a prefix of the adapter is a cache that starts full; each row needs its own, to grow by its own text
        caches = [start_cache(model) or make_prompt_cache(model) for _ in rows]
    else:
        caches = [prefix.cache() for _ in rows]
    batch = [layer[0].merge(layer) for layer in zip(*caches)]
    bodies = [row[prefix.length if prefix else 0 : -1] for row in rows]
    ids, padding = right_padded(bodies)
    if any(padding):
        for cache in batch:
            cache.prepare(lengths=[len(body) for body in bodies], right_padding=padding)
    for first in range(0, ids.shape[1], _CHUNK):
        model(ids[:, first : first + _CHUNK], cache=batch)
        mx.eval([cache.state for cache in batch])
    if any(padding):
        for cache in batch:
            cache.finalize()
        mx.eval([cache.state for cache in batch])
    return batch


def rows_that_fit(model: nn.Module, prompt: int, answer: int) -> int:
    """How many rows of so many tokens may be decoded together: their caches take half of the free memory.

    At most 64: more rows are hardly faster, and whoever watches waits longer for the first answers.
    `prompt` counts virtual tokens too.
    """
    cache = start_cache(model) or make_prompt_cache(model)
    logits = model(mx.zeros((1, prompt), dtype=mx.int32), cache=cache)  # MLX is lazy: nothing is computed
    arrays = [array for layer in cache for _, array in tree_flatten(layer.state)]
    steps = -(-(prompt + answer) // KVCache.step) * KVCache.step  # the caches grow by so many
    held = sum(_grown(array, prompt, steps) for array in arrays if isinstance(array, mx.array))
    row = held + 3 * 4 * logits.shape[-1]  # the last: logits, and their copies where one samples
    return max(1, min(_MOST, device.free_memory(shared=True) // 2 // row))


def _grown(array: mx.array, tokens: int, steps: int) -> int:
    """Bytes of a cache's array with room for `steps`. Keys and values are [rows, heads, time, size]."""
    grows = array.ndim == 4 and array.shape[2] >= tokens
    return array.nbytes // array.shape[2] * steps if grows else array.nbytes


def fill(
    model: nn.Module,
    cache: list[Any],
    prompts: Sequence[Sequence[int]],
    waiting: deque[int],
    prefix: Prefix | None,
    *,
    going: int,
    width: int,
) -> tuple[list[Any], list[int]]:
    """Let prompts of `waiting` enter a batch of `width`, of which `going` are on their way.

    Returns (the cache of all rows, those that entered). Entering copies the cache of all rows, so none
    enters before an eighth of the batch is free. They stand behind the rows of `cache`, which may have none
    ([]), and all their tokens are read but the last: a row goes on with it as if it had just been drawn, so
    entering costs no step of its own. `prompts` have their virtual tokens; `waiting` holds their places,
    longest first.
    """
    known, room = prefix.length if prefix else 0, width - going
    entered: list[int] = []
    if room * 8 < width:
        return cache, entered
    while waiting and len(entered) < room:
        longest = len(prompts[waiting[0]]) - known
        limit = min(room - len(entered), max(1, _READ // longest))
        places = [waiting.popleft()]
        # those of similar length together: padding costs what text costs
        while waiting and len(places) < limit and len(prompts[waiting[0]]) - known >= _SIMILAR * longest:
            places.append(waiting.popleft())
        more = read(model, [prompts[place] for place in places], prefix)
        for layer, other in zip(cache, more):
            layer.extend(other)
        cache = cache or more
        entered += places
    return cache, entered


def logprobs(logits: mx.array) -> mx.array:
    """Logits [.., vocabulary] as log-probabilities in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def reorder(cache: list[Any], sources: list[int], *, trim: bool = False) -> None:
    """Let the rows of the cache be those of `sources`; a row may go on in several, and without any the cache
    is emptied. With `trim`, padding that all rows have goes too."""
    if not sources:
        cache.clear()
    rows = mx.array(sources)
    for layer in cache:
        if type(layer) is BatchKVCache and not trim:
            # its filter() also asks the host how much padding is left, once for every layer
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
            layer.offset, layer.left_padding = layer.offset[rows], layer.left_padding[rows]
        else:
            layer.filter(rows)


def right_padded(rows: Sequence[Sequence[int]]) -> tuple[mx.array, list[int]]:
    """(rows as one array [rows, longest], how many zeros stand at each row's end)."""
    longest = max(len(row) for row in rows)
    padding = [longest - len(row) for row in rows]
    flat = [token for row, pad in zip(rows, padding) for token in [*row, *[0] * pad]]
    return mx.array(flat, dtype=mx.int32).reshape(len(rows), longest), padding
