"""Beam search, the paper's decoding: transformers' semantics, batched over prompts, with a KV cache.

Each prompt keeps `beams` unfinished texts with the highest sum of log-probabilities s, and a list of as many
finished ones, scored s / length^penalty (length counts the generated tokens, the end token among them).
Of the K = beams x max(2, 1 + end tokens) best continuations of a step, those that end are finished if they
are among the first `beams`; the best `beams` of the others stay unfinished. A prompt is done when
its list is full and the best living text, scored at its present length, does not beat the worst finished
one; or at `max_tokens`, where every living text counts as finished. This is `early_stopping=False` of
transformers.

The batch is kept full: a prompt that is done leaves with its beams, and waiting ones enter.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_adapters.adapter.call import all_with_virtual, call_model
from mlx_adapters.cpu import threads
from mlx_adapters.generate.prefill import (
    Cache,
    Prompts,
    admit,
    by_index,
    logprobs,
    longest_first,
    reorder,
    shared_prefix,
    splits,
)

__all__ = ["beam_search"]


@dataclass
class _Search:
    """The beams of one prompt."""

    index: int
    prompt: Sequence[int]
    beams: int
    penalty: float
    living: list[tuple[float, list[int]]] = field(default_factory=lambda: [(0.0, [])])
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    done: bool = False

    def advance(
        self, candidates: list[tuple[float, int, int]], stop: frozenset[int], max_tokens: int
    ) -> list[int]:
        """Take the best continuations (sum, beam, token), best first. Returns the beams that live on."""
        length = len(self.living[0][1]) + 1
        parents: list[int] = []
        living: list[tuple[float, list[int]]] = []
        for rank, (score, beam, token) in enumerate(candidates):
            ids = [*self.living[beam][1], token]
            if token not in stop and length < max_tokens:
                if len(living) < self.beams:
                    living.append((score, ids))
                    parents.append(beam)
            elif rank < self.beams:
                self.finished.append((score / length**self.penalty, ids))
        self.finished = sorted(self.finished, key=lambda one: -one[0])[: self.beams]
        self.living = living
        self.done = not living or (
            len(self.finished) == self.beams and living[0][0] / length**self.penalty <= self.finished[-1][0]
        )
        return parents

    def last_tokens(self) -> list[int]:
        """The last token of each living text, which the next step reads."""
        return [ids[-1] if ids else self.prompt[-1] for _, ids in self.living]

    def best(self, stop: frozenset[int]) -> list[int]:
        ids = self.finished[0][1]
        return ids[:-1] if ids[-1] in stop else ids


def beam_search(
    model: nn.Module,
    prompts: Prompts,
    *,
    stop: frozenset[int],
    max_tokens: int,
    beams: int = 4,
    length_penalty: float = 1.0,
    batch_size: int = 4,
) -> Iterator[tuple[int, list[int]]]:
    """Yield (index, token ids without the end token) of each prompt as it is done; `batch_size` prompts, so
    `batch_size * beams` rows, go together."""
    prompts = by_index(prompts)
    searches = {i: _Search(i, prompts[i], beams, length_penalty) for i in longest_first(prompts)}
    if splits(model):
        run = _cached(model, searches, stop=stop, max_tokens=max_tokens, width=batch_size)
    else:
        run = _uncached(model, list(searches.values()), stop=stop, max_tokens=max_tokens)
    for search in run:
        yield search.index, search.best(stop)


def _cached(
    model: nn.Module, searches: dict[int, _Search], *, stop: frozenset[int], max_tokens: int, width: int
) -> Iterator[_Search]:
    rows = dict(zip(searches, all_with_virtual(model, (search.prompt for search in searches.values()))))
    prefix = shared_prefix(model, list(rows.values()))
    waiting = deque(rows)
    active: list[_Search] = []
    cache: Cache = []
    while active or waiting:
        threads.keep_up()
        cache, admitted = admit(model, cache, rows, waiting, prefix, present=len(active), width=width)
        active += [searches[index] for index in admitted]
        tokens = mx.array([[token] for search in active for token in search.last_tokens()])
        logits = model(tokens, cache=cache)[:, -1]
        sources: list[int] = []  # for each row of the next step, the row whose cache it continues
        first = 0
        for search, found in zip(active, _candidates(logits, active, stop)):
            count = len(search.living)
            parents = search.advance(found, stop, max_tokens)
            sources += [] if search.done else [first + parent for parent in parents]
            first += count
        yield from (search for search in active if search.done)
        some_done = any(search.done for search in active)
        if some_done or sources != list(range(first)):
            reorder(cache, sources, trim=some_done)
        active = [search for search in active if not search.done]


def _uncached(
    model: nn.Module, searches: list[_Search], *, stop: frozenset[int], max_tokens: int
) -> Iterator[_Search]:
    """Each prompt alone, read again for each token: its beams are equally long and need no padding."""
    for search in searches:
        while not search.done:
            texts = mx.array([[*search.prompt, *ids] for _, ids in search.living])
            (found,) = _candidates(call_model(model, texts)[:, -1], [search], stop)
            search.advance(found, stop, max_tokens)
        yield search


def _candidates(
    logits: mx.array, searches: list[_Search], stop: frozenset[int]
) -> list[list[tuple[float, int, int]]]:
    """For each prompt its best continuations (sum of log-probabilities, beam, token), best first."""
    sums = mx.array([score for search in searches for score, _ in search.living])
    totals = logprobs(logits) + sums[:, None]
    # the best of all beams are among the best of each: one small table for the host instead of the vocabulary
    keep = min(max(2, 1 + len(stop)) * searches[0].beams, totals.shape[-1])
    tokens = mx.argpartition(-totals, keep - 1, axis=-1)[:, :keep]
    scores = mx.take_along_axis(totals, tokens, axis=-1)
    mx.eval(tokens, scores)
    all_tokens, all_scores = np.array(tokens), np.array(scores)
    found, first = [], 0
    for search in searches:
        last = first + len(search.living)
        flat = all_scores[first:last].ravel()
        best = np.argsort(-flat, kind="stable")[:keep]
        found.append([(float(flat[i]), int(i) // keep, int(all_tokens[first:last].ravel()[i])) for i in best])
        first = last
    return found
