"""Prefill: the keys and values of many prompts, in batches, behind whatever the adapter puts in front."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from mlx_adapters import device
from mlx_adapters.adapter import layers
from mlx_adapters.adapter.call import close, start_cache

__all__ = [
    "Cache",
    "Prefix",
    "Prompts",
    "admit",
    "by_index",
    "common_prefix",
    "leaves_window",
    "logprobs",
    "longest_first",
    "prefill",
    "read",
    "reorder",
    "right_padded",
    "rows_that_fit",
    "shared_prefix",
    "splits",
]

Cache: TypeAlias = list[Any]
"""mlx-lm's cache: one object per layer, of a class that depends on the layer."""

Prompts: TypeAlias = Sequence[Sequence[int]] | Mapping[int, Sequence[int]]
"""The token ids of each prompt by its index: a list, or the part of one that is asked."""

_CHUNK = 2048  # tokens of a long prompt that are read at once
_SHORTEST_PREFIX = 8  # a shorter prefix saves less than copying its cache costs
_MAX_ROWS = 64
_PREFILL_TOKENS = 4096  # prompt tokens that are read together, padding included
_SIMILAR = 0.85  # prompts at least this long, relative to the longest, are read together with it


def by_index(prompts: Prompts) -> Mapping[int, Sequence[int]]:
    """The prompts under the indices that they keep from here to their answers."""
    return prompts if isinstance(prompts, Mapping) else dict(enumerate(prompts))


def longest_first(rows: Mapping[int, Sequence[int]]) -> list[int]:
    """The indices of the rows, longest row first: neighbours then need little padding."""
    return sorted(rows, key=lambda index: -len(rows[index]))


def splits(model: nn.Module) -> bool:
    """Whether rows of different lengths can share a cache: tried against each row alone, once per model and
    kind of adapter.

    Some state-space layers' caches have no batched form, others take padding into their state, and mlx-lm's
    code for a few models does not take a mask for each row (gpt_bigcode, and gemma2 as mlx-lm has it).
    """
    tried: Mapping[frozenset[type], bool] = getattr(model, "_splits", {})
    kinds = frozenset(map(type, layers(model).values()))
    if kinds not in tried:
        try:
            known = _reads_rows_apart(model)
        except (ValueError, TypeError, AttributeError, NotImplementedError):
            known = False
        # a plain dict would count as a part of the model
        tried = model._splits = MappingProxyType({**tried, kinds: known})
    return tried[kinds]


def _reads_rows_apart(model: nn.Module) -> bool:
    """Two rows in a padded batch, one token further, then some more in a padded batch, against each alone."""
    rows, after, more = [[1, 2, 3, 4, 3, 2, 1, 2, 4, 1, 3, 2], [4, 3, 1]], [[4], [2]], [[1], [3, 4, 2]]
    _, cache = prefill(model, rows)
    found = [model(mx.array(after), cache=cache)]
    if not any(isinstance(layer, BatchRotatingKVCache) for layer in cache):  # see `leaves_window`
        ids, padding = right_padded(more)
        for layer in cache:
            layer.prepare(lengths=[len(text) for text in more], right_padding=padding)
        found.append(model(ids, cache=cache))
    for number, row in enumerate(rows):
        own = start_cache(model) or make_prompt_cache(model)
        model(mx.array([row]), cache=own)
        for batch, texts in zip(found, (after, more)):
            text = texts[number]
            alone = model(mx.array([text]), cache=own)
            if not close(batch[number : number + 1, : len(text)], alone):
                return False
    return True


def leaves_window(model: nn.Module, tokens: int) -> bool:
    """Whether a row of so many tokens is longer than the attention window of some layer.

    mlx-lm's batched cache of such a layer takes single tokens only: several at once get the wrong mask.
    """
    cache = start_cache(model) or make_prompt_cache(model)
    return any(isinstance(layer, RotatingKVCache) and tokens > layer.max_size for layer in cache)


@dataclass(frozen=True)
class Prefix:
    """The first `length` tokens of all rows (virtual tokens among them), read once."""

    length: int
    states: list[tuple[mx.array, mx.array]]

    def cache(self) -> Cache:
        """A cache for one row that continues after the prefix."""
        caches = []
        for keys, values in self.states:
            cache = KVCache()
            # without room to grow: growing copies, so rows may share the arrays
            cache.keys, cache.values, cache.offset = keys, values, keys.shape[2]
            caches.append(cache)
        return caches


def shared_prefix(model: nn.Module, rows: Sequence[Sequence[int]]) -> Prefix | None:
    """The tokens that all rows begin with, computed once; None where that saves nothing, or where the cache
    cannot be continued by many rows.

    `rows` have their virtual tokens. The template and the task's phrases make a third of a short prompt.
    """
    length = common_prefix(rows)
    cache = start_cache(model) or make_prompt_cache(model)
    if len(rows) < 2 or length < _SHORTEST_PREFIX or not all(type(layer) is KVCache for layer in cache):
        return None
    model(mx.array([rows[0][:length]]), cache=cache)
    states = [(c.keys[..., : c.offset, :], c.values[..., : c.offset, :]) for c in cache]
    states = [(mx.contiguous(keys), mx.contiguous(values)) for keys, values in states]
    mx.eval(states)
    return Prefix(length, states)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows have in common at their beginning, leaving at least one token of each row."""
    if not rows:
        return 0
    first, last = min(map(list, rows)), max(map(list, rows))  # all others lie between these two
    limit = min(len(row) for row in rows) - 1
    return next((i for i in range(limit) if first[i] != last[i]), max(limit, 0))


def prefill(
    model: nn.Module, rows: Sequence[Sequence[int]], prefix: Prefix | None = None
) -> tuple[mx.array, Cache]:
    """(logits after each row [rows, vocabulary], the cache of all rows in batched form).

    `rows` are of any length and have their virtual tokens; those of `prefix` are not read again. Needs
    `splits(model)`.
    """
    cache = read(model, rows, prefix)
    return model(mx.array([[row[-1]] for row in rows]), cache=cache)[:, -1], cache


def read(model: nn.Module, rows: Sequence[Sequence[int]], prefix: Prefix | None = None) -> Cache:
    """The cache of all rows in batched form, after all their tokens but the last.

    `rows` have their virtual tokens; those of `prefix` are not read again.
    """
    if prefix is None:
        # prefix tuning starts with a filled cache; each row needs a copy that grows by its own text
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
    for cache in batch:  # without padding too: recurrent layers would keep a mask that hides nothing
        cache.finalize()
    if any(padding):
        mx.eval([cache.state for cache in batch])
    return batch


def rows_that_fit(model: nn.Module, prompt: int, answer: int) -> int:
    """How many rows of so many tokens may be decoded together: their caches take half of the free memory.

    At most 64: more rows are hardly faster, and the first answers come later.
    `prompt` counts virtual tokens too.
    """
    cache = start_cache(model) or make_prompt_cache(model)
    logits = model(mx.zeros((1, prompt), dtype=mx.int32), cache=cache)  # MLX is lazy: nothing is computed
    arrays = [array for layer in cache for _, array in tree_flatten(layer.state)]
    steps = -(-(prompt + answer) // KVCache.step) * KVCache.step  # the caches grow by so many
    cached = sum(_grown(array, prompt, steps) for array in arrays if isinstance(array, mx.array))
    row = cached + 3 * 4 * logits.shape[-1]  # the last: logits, and their copies when sampling
    return max(1, min(_MAX_ROWS, device.free_memory(shared=True) // 2 // row))


def _grown(array: mx.array, tokens: int, steps: int) -> int:
    """Bytes of a cache's array with room for `steps`. Keys and values are [rows, heads, time, size]."""
    grows = array.ndim == 4 and array.shape[2] >= tokens
    return array.nbytes // array.shape[2] * steps if grows else array.nbytes


def admit(
    model: nn.Module,
    cache: Cache,
    prompts: Mapping[int, Sequence[int]],
    waiting: deque[int],
    prefix: Prefix | None,
    *,
    present: int,
    width: int,
) -> tuple[Cache, list[int]]:
    """Let waiting prompts into a batch of `width` rows, of which `present` are taken.

    Admission copies the cache of all rows, so it waits until an eighth of the batch is free. New rows stand
    behind those of `cache`, which may be empty. All but the last token of a prompt is prefilled; the next
    decode step feeds the last, so admission needs no forward pass of its own.

    Args:
        prompts: token ids with their virtual tokens, by index.
        waiting: the indices that wait, longest prompt first; the admitted ones are taken out.

    Returns: the cache of all rows, and the indices that were admitted.
    """
    known, room = prefix.length if prefix else 0, width - present
    admitted: list[int] = []
    if room * 8 < width:
        return cache, admitted
    while waiting and len(admitted) < room:
        longest = len(prompts[waiting[0]]) - known
        limit = min(room - len(admitted), max(1, _PREFILL_TOKENS // longest))
        group = [waiting.popleft()]
        # prompts of similar length together: padding costs what text costs
        while waiting and len(group) < limit and len(prompts[waiting[0]]) - known >= _SIMILAR * longest:
            group.append(waiting.popleft())
        more = read(model, [prompts[index] for index in group], prefix)
        for layer, other in zip(cache, more):
            layer.extend(other)
        cache = cache or more
        admitted += group
    return cache, admitted


def logprobs(logits: mx.array) -> mx.array:
    """Logits [.., vocabulary] as log-probabilities in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def reorder(cache: Cache, sources: list[int], *, trim: bool = False) -> None:
    """Make row i of the cache a copy of row `sources[i]`; no sources empty the cache. `trim` also removes
    padding that all rows have."""
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
    """(rows as one array [rows, longest], the number of zeros at the end of each row)."""
    longest = max(len(row) for row in rows)
    padding = [longest - len(row) for row in rows]
    flat = [token for row, pad in zip(rows, padding) for token in [*row, *[0] * pad]]
    return mx.array(flat, dtype=mx.int32).reshape(len(rows), longest), padding
