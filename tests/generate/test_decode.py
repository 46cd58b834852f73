"""Decoding: the batch must not change an answer, EOS must end it."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny import random_llama

from mlx_adapters import device
from mlx_adapters.errors import ConfigError, DataError
from mlx_adapters.generate.beam import beam_search
from mlx_adapters.generate.decode import Decoding, generate_ids, generate_texts
from mlx_adapters.generate.prefill import rows_that_fit, shared_prefix, splits

SETS = Path(__file__).parents[3] / "shared" / "data" / "test"
VOCABULARY = 97


def tiny(kind: str = "llama") -> nn.Module:
    mx.random.seed(5)
    if kind == "gpt2":
        from mlx_lm.models import gpt2

        model = gpt2.Model(
            gpt2.ModelArgs(
                model_type="gpt2",
                n_ctx=128,
                n_embd=32,
                n_head=4,
                n_layer=2,
                n_positions=128,
                layer_norm_epsilon=1e-5,
                vocab_size=VOCABULARY,
            )
        )
    else:
        model = random_llama(vocab_size=VOCABULARY, tie_word_embeddings=True)
    # Larger weights: clear winners, and answers that depend on the whole prompt.
    model.update(nn.utils.tree_map(lambda x: x * 3 if x.ndim == 2 else x, model.parameters()))
    mx.eval(model.parameters())
    return model


def ragged(count: int, *, seed: int = 1, longest: int = 40) -> list[list[int]]:
    chooser = random.Random(seed)
    lengths = [1, 2, longest] + [chooser.randint(1, longest) for _ in range(count - 3)]
    return [[chooser.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def reference(model: nn.Module, prompt: list[int], *, stop: frozenset[int], max_tokens: int) -> list[int]:
    """No cache, no batch: the whole sequence through the model for every token."""
    ids: list[int] = []
    for _ in range(max_tokens):
        token = int(mx.argmax(model(mx.array([prompt + ids]))[0, -1]).item())
        if token in stop:
            break
        ids.append(token)
    return ids


class Tokenizer:
    """What `generate_texts` needs of mlx-lm's wrapper."""

    def __init__(self, *stop: int) -> None:
        self.eos_token_ids = set(stop)

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_ragged_batch_gives_the_tokens_of_uncached_single_runs(kind: str, batch_size: int) -> None:
    model, prompts = tiny(kind), ragged(11)
    expected = [reference(model, prompt, stop=frozenset(), max_tokens=12) for prompt in prompts]
    assert len({tuple(answer) for answer in expected}) > 5, "the test model must tell prompts apart"
    got = dict(generate_ids(model, prompts, stop=frozenset(), max_tokens=12, batch_size=batch_size))
    assert [got[index] for index in range(len(prompts))] == expected


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_end_token_stops_its_row_and_is_left_out(batch_size: int) -> None:
    model, prompts = tiny(), ragged(9)
    free = [reference(model, prompt, stop=frozenset(), max_tokens=10) for prompt in prompts]
    stop = frozenset({free[0][3], free[1][0]})
    expected = [reference(model, prompt, stop=stop, max_tokens=10) for prompt in prompts]
    got = dict(generate_ids(model, prompts, stop=stop, max_tokens=10, batch_size=batch_size))
    assert got == dict(enumerate(expected))
    assert any(len(answer) < 10 for answer in expected)
    assert expected[1] == []


@pytest.mark.parametrize("width", [2, 7, 8, 24])
def test_rows_leave_and_enter_and_none_goes_past_its_limit(width: int) -> None:
    """Finished rows wait to leave together; a model with learned positions has none beyond the last token."""
    limit, farthest = 12, 0

    class Watched(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.layers = inner, inner.layers

        def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
            nonlocal farthest
            farthest = max(farthest, int(mx.array(cache[0].offset).max().item()) + ids.shape[1])
            result: mx.array = self.inner(ids, cache=cache)
            return result

    model = tiny()
    prompts = ragged(20, seed=3) + [[n, n + 1, n + 2] for n in range(20)]
    free = [reference(model, prompt, stop=frozenset(), max_tokens=limit) for prompt in prompts]
    stop = frozenset(answer[index % limit] for index, answer in enumerate(free[:6]))
    expected = []
    for answer in free:
        end = next((i for i, token in enumerate(answer) if token in stop), limit)
        expected.append(answer[:end])
    assert len({len(answer) for answer in expected}) > 5, "rows must end at many places"
    watched = Watched(model)
    assert splits(watched)  # is tried once
    farthest = 0
    got = dict(generate_ids(watched, prompts, stop=stop, max_tokens=limit, batch_size=width))
    assert [got[index] for index in range(len(prompts))] == expected
    assert farthest <= max(map(len, prompts)) - 1 + limit

    ended = dict(
        generate_ids(
            model,
            prompts,
            stop=frozenset(),
            max_tokens=limit,
            batch_size=width,
            until=lambda index, ids: len(ids) > index % 5,
        )
    )
    assert ended == {index: answer[: index % 5 + 1] for index, answer in enumerate(free)}


def test_rows_are_streamed_before_the_last_prompt_is_done() -> None:
    calls = 0

    class Counting(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.layers = inner.layers

        def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
            nonlocal calls
            calls += 1
            result: mx.array = self.inner(ids, cache=cache)
            return result

    model = Counting(tiny())
    assert splits(model)  # is tried once
    calls = 0
    stream = generate_texts(model, Tokenizer(), ragged(8), max_tokens=4, batch_size=2)
    next(stream)
    first = calls
    assert len(list(stream)) == 7
    assert calls > 2 * first


def test_text_is_decoded_per_index_and_longest_prompt_goes_first() -> None:
    model, prompts = tiny(), ragged(6)
    rows = list(generate_texts(model, Tokenizer(), prompts, max_tokens=5, batch_size=1))
    assert rows[0][0] == 2
    for index, text in rows:
        assert text == " ".join(map(str, reference(model, prompts[index], stop=frozenset(), max_tokens=5)))


def test_dropout_is_off_while_decoding_and_training_mode_comes_back() -> None:
    class Noisy(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.dropout = inner, nn.Dropout(0.9)

        def __call__(self, x: mx.array) -> mx.array:
            return self.dropout(self.inner(x))  # type: ignore[no-any-return]

    model, prompts = tiny(), ragged(5)
    expected = dict(generate_ids(model, prompts, stop=frozenset(), max_tokens=6, batch_size=4))
    layer = model.layers[0].mlp
    layer.down_proj = Noisy(layer.down_proj)
    model.train()
    assert dict(generate_ids(model, prompts, stop=frozenset(), max_tokens=6, batch_size=4)) == expected
    assert model.training
    assert layer.down_proj.dropout.training


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_all_prompts_begin_with_is_read_once_and_changes_nothing(batch_size: int) -> None:
    model = tiny()
    front = ragged(3)[2][:30]
    prompts = [front + prompt for prompt in ragged(9)] + [front + [5]]
    expected = [reference(model, prompt, stop=frozenset(), max_tokens=8) for prompt in prompts]
    got = dict(generate_ids(model, prompts, stop=frozenset(), max_tokens=8, batch_size=batch_size))
    assert [got[index] for index in range(len(prompts))] == expected
    prefix = shared_prefix(model, prompts)
    assert prefix is not None
    assert prefix.length == 30
    assert shared_prefix(model, ragged(9)) is None


def test_beams_are_a_decoding() -> None:
    model, prompts = tiny(), ragged(7)
    beam = Decoding(kind="beam", beams=3)
    got = dict(generate_ids(model, prompts, stop=frozenset({3}), max_tokens=6, batch_size=8, decoding=beam))
    expected = dict(beam_search(model, prompts, stop=frozenset({3}), max_tokens=6, beams=3))
    assert got == expected
    assert got != dict(generate_ids(model, prompts, stop=frozenset({3}), max_tokens=6, batch_size=8))


def test_samples_depend_on_seed_and_number_not_on_the_batch() -> None:
    model, prompts = tiny(), ragged(8)
    hot = Decoding(kind="sample", temperature=2.0, top_p=1.0, top_k=40)

    def sampled(
        rows: list[list[int]] | dict[int, list[int]], batch_size: int, **options: Any
    ) -> dict[int, list[int]]:
        options = {"decoding": hot} | options
        return dict(
            generate_ids(model, rows, stop=frozenset(), max_tokens=6, batch_size=batch_size, **options)
        )

    first = sampled(prompts, 4)
    assert sampled(prompts, 1) == first
    assert sampled(prompts, 8, decoding=replace(hot, seed=1)) != first
    assert sampled({5: prompts[5], 2: prompts[2]}, 4) == {5: first[5], 2: first[2]}
    assert sampled([prompts[5]] * 8, 4) != dict.fromkeys(range(8), first[5])
    cold = Decoding(kind="sample", temperature=1e-3, top_p=1.0)
    greedy = dict(generate_ids(model, prompts, stop=frozenset(), max_tokens=6, batch_size=4))
    assert sampled(prompts, 4, decoding=cold) == greedy


def test_samples_are_drawn_as_transformers_warps() -> None:
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = mx.random.normal((1, 50), key=mx.random.key(1)) * 2
    scores = torch.tensor(logits.tolist())
    for warp in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(12), TopPLogitsWarper(0.75)):
        scores = warp(torch.zeros(1, 1, dtype=torch.long), scores)
    share = torch.softmax(scores, dim=-1)[0].numpy()
    sampler = Decoding(kind="sample", temperature=0.8, top_k=12, top_p=0.75).sampler(0)
    drawn = [int(sampler(logits).item()) for _ in range(2000)]
    counted = np.bincount(drawn, minlength=50) / 2000
    assert 2 <= (share > 0).sum() <= 11
    assert (counted[share == 0] == 0).all()
    assert np.abs(counted - share).max() < 0.05  # four standard deviations


def test_settings_that_make_no_sense_are_named() -> None:
    with pytest.raises(ConfigError, match=r"Unknown decoding 'beams'\. Did you mean 'beam'"):
        Decoding(kind="beams")
    with pytest.raises(ConfigError, match="temperature 0"):
        Decoding(temperature=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_by_default_the_caches_of_a_batch_take_half_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model, prompts, free = tiny(kind), ragged(60), 1 << 40
    monkeypatch.setattr(device, "free_memory", lambda *, shared: free)
    largest = widest = 0

    class Watched(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.layers = inner, inner.layers

        def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
            nonlocal largest, widest
            result: mx.array = self.inner(ids, cache=cache)
            if len(ids) == 13:  # the trial of `splits`
                return result
            widest = max(widest, len(ids))
            largest = max(largest, sum(layer.keys.nbytes + layer.values.nbytes for layer in cache))
            return result

    def decoded() -> dict[int, list[int]]:
        return dict(generate_ids(Watched(model), prompts, stop=frozenset(), max_tokens=10))

    assert rows_that_fit(model, 40, 10) == 64
    expected = decoded()
    assert widest > 32
    while rows_that_fit(model, 40, 10) > 7:
        free = int(free * 0.99)
    largest = widest = 0
    assert decoded() == expected
    assert (widest, rows_that_fit(model, 40, 10)) == (7, 7)
    assert free / 3 < largest <= free / 2
    free = widest = 0
    assert decoded() == expected
    assert widest == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["base", "lora", "series", "prefix"])
def test_two_hundred_real_prompts_are_answered_the_same_one_by_one(method: str, smollm2: Path) -> None:
    from mlx_adapters import adapter, methods
    from mlx_adapters.data.templates import prompt_for
    from mlx_adapters.data.tokens import prompt_ids
    from mlx_adapters.evaluate.tasks import load_items
    from mlx_adapters.models.load import load

    if not SETS.is_dir():
        pytest.skip(f"{SETS} is not here: published test sets are not part of the project")
    loaded = load(smollm2)
    if method != "base":
        adapter.attach(loaded, methods.make(method, {}))
        noise = [
            (name, array + 0.02 * mx.random.normal(array.shape, key=mx.random.key(number)))
            for number, (name, array) in enumerate(tree_flatten(loaded.model.trainable_parameters()))
        ]
        loaded.model.load_weights(noise, strict=False)
    items = [item for name in ("gsm8k", "boolq") for item in load_items(name, data_dir=SETS, limit=100)]
    prompts = [
        prompt_ids(
            prompt_for(item.instruction, template="alpaca", tokenizer=loaded.tokenizer, phase="eval"),
            loaded.tokenizer,
        )
        for item in items
    ]
    stop = frozenset(loaded.tokenizer.eos_token_ids)
    together = dict(generate_ids(loaded.model, prompts, stop=stop, max_tokens=32, batch_size=16))
    alone = dict(generate_ids(loaded.model, prompts, stop=stop, max_tokens=32, batch_size=1))
    assert len({tuple(answer) for answer in alone.values()}) > 50
    assert [index for index in range(200) if together[index] != alone[index]] == []


def test_no_prompts_no_rows() -> None:
    assert list(generate_texts(tiny(), Tokenizer(), [], max_tokens=3, batch_size=4)) == []


def test_bad_requests_are_named() -> None:
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        list(generate_texts(tiny(), Tokenizer(), [[1], []], max_tokens=3, batch_size=2))
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        list(generate_texts(tiny(), Tokenizer(), [[1]], max_tokens=0, batch_size=2))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        list(generate_texts(tiny(), Tokenizer(), [[1]], max_tokens=2, batch_size=0))
