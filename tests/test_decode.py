"""Greedy decoding: the batch must not change an answer, EOS must end it."""

import random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_adapters.errors import ConfigError, DataError
from mlx_adapters.evaluate.decode import generate, generate_ids

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
        from mlx_lm.models import llama

        model = llama.Model(
            llama.ModelArgs(
                model_type="llama",
                hidden_size=32,
                num_hidden_layers=2,
                intermediate_size=64,
                num_attention_heads=4,
                num_key_value_heads=2,
                rms_norm_eps=1e-5,
                vocab_size=VOCABULARY,
            )
        )
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
    """What `generate` needs of mlx-lm's wrapper."""

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

    stream = generate(Counting(tiny()), Tokenizer(), ragged(8), max_tokens=4, batch_size=2)
    next(stream)
    first = calls
    assert len(list(stream)) == 7
    assert calls > 2 * first


def test_text_is_decoded_per_index_and_longest_prompt_goes_first() -> None:
    model, prompts = tiny(), ragged(6)
    rows = list(generate(model, Tokenizer(), prompts, max_tokens=5, batch_size=1))
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


def test_no_prompts_no_rows() -> None:
    assert list(generate(tiny(), Tokenizer(), [], max_tokens=3, batch_size=4)) == []


def test_bad_requests_are_named() -> None:
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        list(generate(tiny(), Tokenizer(), [[1], []], max_tokens=3, batch_size=2))
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        list(generate(tiny(), Tokenizer(), [[1]], max_tokens=0, batch_size=2))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        list(generate(tiny(), Tokenizer(), [[1]], max_tokens=2, batch_size=0))
