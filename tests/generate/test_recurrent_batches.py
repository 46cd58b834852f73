"""Batches of models with recurrent layers: the answers and likelihoods of each prompt by itself."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import samples

from mlx_adapters.generate.decode import generate_ids
from mlx_adapters.generate.likelihood import loglikelihoods
from mlx_adapters.generate.prefill import splits
from mlx_adapters.models.recurrent.install import in_chunks

PROMPTS = [np.random.default_rng(n).integers(1, 60, n).tolist() for n in (21, 3, 9, 17)]
CHOICES = [[5], [2, 3, 4], [9, 9, 9, 9, 1]]


@pytest.mark.parametrize(
    ("name", "together"),
    [
        ("qwen3_5", True),
        ("lfm2", True),
        ("mamba2", True),
        ("nemotron_h", True),
        ("falcon_h1", True),
        ("mamba", False),
        ("jamba", False),
        ("rwkv7", False),
        ("afm7", False),
        ("recurrent_gemma", False),
    ],
)
def test_a_batch_answers_as_each_prompt_alone(name: str, together: bool) -> None:
    model = samples.sample(name)
    in_chunks(model)
    assert together in (None, splits(model)), (
        "rows that share a batch where that is wrong, or do not where it is right"
    )

    alone = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(3):
            ids.append(mx.argmax(model(mx.array([ids]))[0, -1]).item())
        alone.append(ids[len(prompt) :])
    options: dict[str, Any] = {"stop": frozenset(), "max_tokens": 3, "batch_size": len(PROMPTS)}
    found = dict(generate_ids(model, PROMPTS, **options))
    assert [found[index] for index in range(len(PROMPTS))] == alone

    items = [(prompt, CHOICES) for prompt in PROMPTS]
    for index, scores in loglikelihoods(model, items, batch_size=len(PROMPTS)):
        prompt = PROMPTS[index]
        for choice, score in zip(CHOICES, scores, strict=True):
            logits = model(mx.array([[*prompt, *choice][:-1]]))[0, len(prompt) - 1 :]
            each = nn.log_softmax(logits.astype(mx.float32))[mx.arange(len(choice)), mx.array(choice)]
            assert score == pytest.approx(each.sum().item(), abs=1e-4)


def test_what_only_goes_wrong_with_several_padded_tokens_is_seen() -> None:
    class Forgetful(nn.Module):
        """Right with a prompt and with one token further, but not with several at once after a cache."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.layers = inner, inner.layers

        def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
            kept = cache is not None and ids.shape[0] > 1 and not isinstance(cache[0].offset, int)
            continued = kept and ids.shape[1] > 1 and mx.max(cache[0].offset).item() > 0
            logits: mx.array = self.inner(ids, cache=cache)
            return logits + mx.arange(ids.shape[0])[:, None, None] if continued else logits

    model = samples.sample("llama")
    assert splits(model)
    assert not splits(Forgetful(model))
