"""The log-likelihood of each choice after its prompt, as lm-evaluation-harness scores multiple choice.

The prompt is read once; every choice continues its cache. `pick` gives the two usual answers: the choice
with the highest log p (acc), and the one with the highest log p / characters (acc_norm), since a longer text
is less likely whatever it says.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_adapters.adapter.call import all_with_virtual, before_text, call_model
from mlx_adapters.cpu import threads
from mlx_adapters.errors import DataError
from mlx_adapters.generate.prefill import (
    Prefix,
    leaves_window,
    logprobs,
    longest_first,
    prefill,
    reorder,
    right_padded,
    rows_that_fit,
    shared_prefix,
    splits,
)
from mlx_adapters.models.limits import check_ids, check_length

__all__ = ["Choices", "choice_ids", "loglikelihoods", "pick", "scored"]

Choices: TypeAlias = tuple[Sequence[int], Sequence[Sequence[int]]]
"""The token ids of a prompt, and those of each choice after it."""

Scores = list[tuple[float, bool]]  # of each choice: its log p, and whether greedy decoding would write it

_TOKENS = 1024  # of choices at a time: their logits over a vocabulary of 49k take 200 MB


def choice_ids(context: str, choice: str, tokenizer: TokenizerWrapper) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the choice, cut as lm-evaluation-harness cuts them.

    Both are encoded as one text, so that a token may not span them unnoticed; white space at the end of the
    context belongs to the choice.
    """
    blank = len(context) - len(context.rstrip())
    if blank:
        context, choice = context[:-blank], context[-blank:] + choice
    start = tokenizer.bos_token
    special = not (start and context.startswith(start))
    whole = list(tokenizer.encode(context + choice, add_special_tokens=special))
    head = list(tokenizer.encode(context, add_special_tokens=special))
    return head, whole[len(head) :]


def pick(scores: Sequence[float], lengths: Sequence[int]) -> tuple[int, int]:
    """(index of the most likely choice, index of the most likely per character)."""
    norm = [score / length for score, length in zip(scores, lengths)]
    return int(np.argmax(scores)), int(np.argmax(norm))


def loglikelihoods(
    model: nn.Module,
    items: Sequence[Choices] | Mapping[int, Choices],
    *,
    batch_size: int | None = None,
) -> Iterator[tuple[int, list[float]]]:
    """Yield (index, log p of each choice) of every item as it is done, not in the order of the items.

    `batch_size` prompts go together, by default as many as memory allows. Raises DataError for a
    prompt or a choice without tokens.
    """
    for index, scores in scored(model, items, batch_size=batch_size):
        yield index, [score for score, _ in scores]


def scored(
    model: nn.Module,
    items: Sequence[Choices] | Mapping[int, Choices],
    *,
    batch_size: int | None = None,
) -> Iterator[tuple[int, Scores]]:
    """`loglikelihoods`, and for each choice whether greedy decoding would write it."""
    items = items if isinstance(items, Mapping) else dict(enumerate(items))
    prompts = {index: prompt for index, (prompt, _) in items.items()}
    choices_of = {index: choices for index, (_, choices) in items.items()}
    for index, (prompt, choices) in items.items():
        if not prompt or not choices or not all(choices):
            raise DataError(f"item {index}: the prompt and each of its choices must have a token")
    order = longest_first(prompts)
    training = model.training
    model.eval()
    try:
        rows = dict(zip(prompts, all_with_virtual(model, prompts.values())))
        longest = max(map(len, rows.values()), default=1)
        texts = [text for choices in choices_of.values() for text in choices]
        answer = max(map(len, texts), default=0)
        check_ids(model, texts)
        check_length(model, max(map(len, prompts.values()), default=0) + before_text(model) + answer)
        cached = splits(model) and not leaves_window(model, longest + answer)
        prefix = shared_prefix(model, list(rows.values())) if cached else None
        if batch_size is None:
            widest = max(map(len, choices_of.values()), default=1)
            batch_size = max(1, rows_that_fit(model, longest, answer) // widest)
        counts = [_tokens(choices_of[index]) for index in order]
        for group in _groups(order, counts, batch_size if cached else 1):
            threads.keep_up()
            if cached:
                together = [choices_of[index] for index in group]
                yield from zip(group, _cached(model, [rows[index] for index in group], together, prefix))
            else:
                yield from ((index, _uncached(model, *items[index])) for index in group)
    finally:
        model.train(training)


def _tokens(choices: Sequence[Sequence[int]]) -> int:
    return len(choices) * max(len(choice) for choice in choices)


def _groups(order: list[int], tokens: list[int], batch_size: int) -> Iterator[list[int]]:
    """Neighbours of `order` to score together: at most `batch_size`, and `_TOKENS` tokens of choices."""
    group: list[int] = []
    total = 0
    for index, count in zip(order, tokens):
        if group and (len(group) == batch_size or total + count > _TOKENS):
            yield group
            group, total = [], 0
        group.append(index)
        total += count
    if group:
        yield group


def _cached(
    model: nn.Module,
    rows: list[list[int]],
    choices: list[Sequence[Sequence[int]]],
    prefix: Prefix | None,
) -> list[Scores]:
    logits, cache = prefill(model, rows, prefix)
    owners = [index for index, some in enumerate(choices) for _ in some]
    texts = [list(choice) for some in choices for choice in some]
    start, likely = mx.array([text[0] for text in texts]), mx.argmax(logits, axis=-1)[mx.array(owners)]
    scores = np.array(logprobs(logits)[mx.array(owners), start])
    greedy = np.array(likely == start)
    longest = max(len(text) for text in texts) - 1
    if longest:
        reorder(cache, owners)
        ids, padding = right_padded([text[:-1] for text in texts])
        for layer in cache:
            layer.prepare(lengths=[len(text) - 1 for text in texts], right_padding=padding)
        rest, same = _gathered(model(ids, cache=cache), [text[1:] for text in texts])
        scores, greedy = scores + rest, greedy & same
    each = zip(scores.tolist(), greedy.tolist())
    return [[next(each) for _ in some] for some in choices]


def _uncached(model: nn.Module, prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> Scores:
    ids, _ = right_padded([[*prompt, *choice][:-1] for choice in choices])
    logits = call_model(model, ids)[:, len(prompt) - 1 :]
    sums, greedy = _gathered(logits, choices)
    return list(zip(sums.tolist(), greedy.tolist()))


def _gathered(
    logits: mx.array, targets: Sequence[Sequence[int]]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(sum of the log-probabilities, whether all were the likeliest) of each row's targets, which may be
    fewer than its positions."""
    ids, padding = right_padded(targets)
    real = mx.arange(ids.shape[1]) < ids.shape[1] - mx.array(padding)[:, None]
    logits = logits[:, : ids.shape[1]]
    taken = mx.take_along_axis(logprobs(logits), ids[..., None], axis=-1)[..., 0]
    greedy = (mx.argmax(logits, axis=-1) == ids) | ~real
    return np.array(mx.where(real, taken, 0.0).sum(axis=-1)), np.array(greedy.all(axis=-1))
