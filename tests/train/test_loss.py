"""The loss over supervised tokens: against a plain float64 computation, and what the head split refuses."""

from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma2, gpt2
from tiny import random_llama

from mlx_adapters import adapter, methods
from mlx_adapters.adapter.call import needs_cache
from mlx_adapters.data.batches import Batch, make_batch
from mlx_adapters.data.tokens import Example
from mlx_adapters.methods.base import plain_weight
from mlx_adapters.train import loss as losses
from mlx_adapters.train.loss import Head, loss_sum, split_head

VOCAB = 48


def make(*, tied: bool = False, layers: int = 2) -> Any:
    """A random llama with LoRA whose update is not zero."""
    mx.random.seed(0)
    model = random_llama(num_hidden_layers=layers, tie_word_embeddings=tied)
    adapter.attach(model, methods.make("lora", {"rank": 4}))
    for layer in adapter.layers(model).values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.3
    mx.eval(model.parameters())
    return model


def batch(seed: int = 0, rows: int = 5) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 20, rows)
    return make_batch([[Example(rng.integers(3, VOCAB, n).tolist(), int(n) // 2)] for n in lengths], pad_id=0)


def plain(model: Any, given: Batch) -> float:
    """The definition, in numpy and float64, target by target."""
    logits = np.array(model(given.ids)).astype(np.float64)
    total = 0.0
    for row, column in zip(*np.nonzero(given.label_mask), strict=True):
        scores = logits[row, column - 1]
        largest = scores.max()
        log_sum = largest + np.log(np.exp(scores - largest).sum())
        total += log_sum - scores[given.ids[row, column].item()]
    return float(total)


@pytest.mark.parametrize("tied", [False, True])
def test_value_is_the_definition(tied: bool) -> None:
    model, given = make(tied=tied), batch()
    head = split_head(model)
    assert head is not None, "a llama has a backbone and a head"
    wanted = plain(model, given)
    assert loss_sum(model, given, head=head).item() == pytest.approx(wanted, rel=1e-5)
    assert loss_sum(model, given, head=None).item() == pytest.approx(wanted, rel=1e-5)


def gradients(model: Any, given: Batch, head: Any) -> dict[str, np.ndarray]:
    grads = nn.value_and_grad(model, lambda: loss_sum(model, given, head=head))()[1]
    return {name: np.array(array) for name, array in tree_flatten(grads)}


def test_gradient_is_the_same_with_and_without_the_split() -> None:
    model, given = make(), batch()
    split, whole = gradients(model, given, split_head(model)), gradients(model, given, None)
    assert set(split) == set(whole)
    for name in whole:
        np.testing.assert_allclose(split[name], whole[name], atol=1e-4 * np.abs(whole[name]).max())


def test_gradient_agrees_with_finite_differences() -> None:
    model, given = make(layers=1), batch()
    layer = next(iter(adapter.layers(model).values()))
    path = next(iter(adapter.layers(model)))
    gradient = gradients(model, given, split_head(model))[f"{path}.lora_a"]
    direction = mx.random.normal(layer.lora_a.shape)
    start, width = layer.lora_a, 1e-2
    values = []
    for sign in (1, -1):
        layer.lora_a = start + sign * width * direction
        values.append(plain(model, given))
    slope = (values[0] - values[1]) / (2 * width)
    assert float((gradient * np.array(direction)).sum()) == pytest.approx(slope, rel=1e-2)


def test_rows_and_padding_beyond_the_mask_do_not_matter() -> None:
    model, given = make(), batch()
    wider = np.pad(np.array(given.ids), ((0, 1), (0, 8)), constant_values=7)
    mask = np.pad(given.label_mask, ((0, 1), (0, 8)))
    other = Batch.from_mask(wider, mask, tokens=given.tokens, supervised=given.supervised)
    head = split_head(model)
    ours = loss_sum(model, other, head=head).item()
    assert ours == pytest.approx(loss_sum(model, given, head=head).item(), rel=1e-5)


def test_nothing_supervised_is_zero_with_zero_gradient() -> None:
    """0/0 in mlx-lm: one such batch turns every weight to NaN."""
    model, given = make(), batch()
    nothing = np.zeros_like(given.label_mask)
    empty = Batch.from_mask(np.array(given.ids), nothing, tokens=given.tokens, supervised=0)
    assert loss_sum(model, empty, head=split_head(model)).item() == 0
    for array in gradients(model, empty, split_head(model)).values():
        assert not array.any()


def test_logits_only_where_something_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head sees the supervised tokens (rounded up), not rows x time."""
    model, given = make(), batch(rows=40)
    head = split_head(model)
    assert head is not None
    seen = []
    real = losses._VocabChunk.logits

    def watching(self: Any, hidden: mx.array) -> mx.array:
        seen.append(hidden.shape[0])
        return real(self, hidden)

    monkeypatch.setattr(losses._VocabChunk, "logits", watching)
    loss_sum(model, given, head=head)
    assert given.supervised <= sum(seen) < given.supervised + 64
    assert sum(seen) < given.ids.size


class Backbone(nn.Embedding):
    """Hidden states that are the embeddings, from a call that models have."""

    layers: ClassVar[list[nn.Module]] = []

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        return super().__call__(ids)


def head_of(kind: str, vocab: int, width: int) -> nn.Module:
    mx.random.seed(1)
    if kind.startswith("tied"):
        layer: nn.Module = nn.Embedding(vocab, width)
        layer.weight = mx.random.normal(layer.weight.shape)
    else:
        layer = nn.Linear(width, vocab, bias="bias" in kind)
    layer = layer.to_quantized(group_size=32, bits=4) if "4 bits" in kind else layer
    layer.freeze()
    return layer


@pytest.mark.parametrize(
    "kind", ["linear", "bias", "tied", "linear in 4 bits", "bias in 4 bits", "tied in 4 bits"]
)
@pytest.mark.parametrize("size", [1.0, 10.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_chunked_loss_and_gradient_are_the_definition(
    kind: str, size: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64, also with logits so wide that most probabilities vanish.

    1e-6 of the largest value, but float32 itself cannot do better than its rounding of the logits, which the
    exponential turns into a relative error: eps * max|logit|.
    """
    monkeypatch.setattr(losses, "_CHUNK", 64)
    monkeypatch.setattr(losses, "_LOGITS", dict.fromkeys(("cpu", "gpu"), 0))
    layer = head_of(kind, 300, 32)  # in chunks of 64 tokens, the last one smaller
    picked = batch(seed=3, rows=40)
    backbone = Backbone(300, 32)
    backbone.weight = mx.random.normal(backbone.weight.shape) * size
    assert not needs_cache(backbone)  # which is asked before anything is traced
    head = Head(backbone, layer)
    assert head.frozen
    computed = mx.value_and_grad(lambda w: loss_sum(_with(backbone, w), picked, head=head))
    table = backbone.weight
    value, slope = (mx.compile(computed) if compiled else computed)(table)
    backbone.weight = table
    loss, gradient, largest = in_float64(backbone.weight, layer, picked)
    bound = max(1e-6, 2**-23 * largest)
    assert value.item() == pytest.approx(loss, rel=bound)
    np.testing.assert_allclose(slope, gradient, atol=bound * np.abs(gradient).max())
    assert loss_sum(backbone, picked, head=head, gradient=False).item() == pytest.approx(loss, rel=bound)


def in_float64(table: mx.array, layer: nn.Module, picked: Any) -> tuple[float, np.ndarray, float]:
    """(loss, gradient with respect to the table, max|logit|) by the definition."""
    ids = np.array(picked.ids)[:, :-1].reshape(-1)[np.array(picked.positions)]
    weight = np.array(plain_weight(layer)).astype(np.float64)
    bias = np.array(layer.bias).astype(np.float64) if "bias" in layer else 0.0
    logits = np.array(table).astype(np.float64)[ids] @ weight.T + bias
    shifted = logits - logits.max(axis=1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    rows, wanted, w = np.arange(len(ids)), np.array(picked.labels), np.array(picked.weights)
    loss = float((-np.log(p[rows, wanted]) * w).sum())
    p[rows, wanted] -= 1
    gradient = np.zeros(table.shape)
    np.add.at(gradient, ids, (p * w[:, None]) @ weight)
    return loss, gradient, float(np.abs(logits).max())


def _with(embedding: nn.Embedding, weight: mx.array) -> nn.Embedding:
    embedding.weight = weight
    return embedding


def test_a_head_that_trains_gets_its_gradient() -> None:
    """An adapter on the head, or a head to save: the closed form would leave it out."""
    model, given = make(), batch()
    model.lm_head.unfreeze()
    grads = gradients(model, given, split_head(model))
    assert np.abs(grads["lm_head.weight"]).max() > 0


def test_a_soft_capped_head_is_not_split() -> None:
    args = gemma2.ModelArgs(
        model_type="gemma2",
        hidden_size=32,
        num_hidden_layers=1,
        intermediate_size=64,
        num_attention_heads=4,
        head_dim=8,
        rms_norm_eps=1e-5,
        vocab_size=VOCAB,
        num_key_value_heads=2,
        final_logit_softcapping=3.0,
    )
    model, given = gemma2.Model(args), batch()
    assert split_head(model) is None
    assert loss_sum(model, given, head=None).item() == pytest.approx(plain(model, given), rel=1e-5)


def test_another_family_is_split_or_right_without() -> None:
    args = gpt2.ModelArgs(
        model_type="gpt2",
        n_ctx=64,
        n_embd=32,
        n_head=4,
        n_layer=1,
        n_positions=64,
        layer_norm_epsilon=1e-5,
        vocab_size=VOCAB,
    )
    model, given = gpt2.Model(args), batch()
    value = loss_sum(model, given, head=split_head(model)).item()
    assert value == pytest.approx(plain(model, given), rel=1e-5)


@pytest.mark.parametrize("gradient", [False, True])
def test_the_logits_of_all_chunks_are_never_there_together(
    gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_LOGITS", {"cpu": 1 << 17, "gpu": 1 << 17})
    tokens, words = 512, 65536
    layer, hidden = nn.Embedding(words, 8), mx.random.normal((tokens, 8))
    labels, weights = mx.zeros((tokens,), mx.int32), mx.ones((tokens,))
    batch = Batch(labels[None], labels, labels, weights, tokens, tokens)
    mx.eval(layer.parameters(), hidden, labels, weights)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(losses._chunked_cross_entropy(hidden, batch, layer, gradient=gradient))
    assert mx.get_peak_memory() - before < 4 * tokens * words / 2, "half of them"
