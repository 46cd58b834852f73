"""Attention in blocks against float64, in value and gradient; what it leaves out; models that call it."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import base, gpt_oss

from mlx_adapters.models import attention as called
from mlx_adapters.models import attention_blocks as blocks
from mlx_adapters.models.attention import attention
from mlx_adapters.models.masks import Mask, create_attention_mask
from mlx_adapters.train.caches import ExampleCache
from mlx_adapters.train.recompute import Recompute

WIDTH = 8
Sizes = tuple[int, int, int, int, int]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_QUERIES", {"cpu": 16, "gpu": 16})
    monkeypatch.setattr(blocks, "_KEYS", {"cpu": 32, "gpu": 32})
    monkeypatch.setattr(blocks, "SCORES", 1)
    monkeypatch.setattr(called, "_MOST_SCORES", 0)


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    with called.differentiated():
        yield


def starts(rows: int, time: int) -> np.ndarray:
    """Where the examples of rows begin that have several, other ones in every row."""
    every = [np.arange(time) // size * size for size in range(7, 7 + rows)]
    return np.array(every, np.int32)


# (rows, heads, kv heads, queries, keys) -> mask
MASKS = {
    "none": lambda rows, heads, time, length: None,
    "causal": lambda rows, heads, time, length: "causal",
    "window": lambda rows, heads, time, length: Mask(time, length, window=7),
    "wide window": lambda rows, heads, time, length: Mask(time, length, window=40),
    "one for all": lambda rows, heads, time, length: mx.random.bernoulli(0.6, (time, length)),
    "by row": lambda rows, heads, time, length: mx.random.bernoulli(0.6, (rows, 1, time, length)),
    "added by head": lambda rows, heads, time, length: mx.random.normal((1, heads, time, length)),
    "added to keys": lambda rows, heads, time, length: mx.random.normal((rows, heads, 1, length)),
    "added to all": lambda rows, heads, time, length: mx.random.normal((time, length)),
    "nothing seen": lambda rows, heads, time, length: mx.zeros((rows, 1, time, length), mx.bool_),
}
PACKED = {
    "packed": lambda s, time: Mask(time, time, None, mx.array(s), s),
    "packed, window": lambda s, time: Mask(time, time, 9, mx.array(s), s),
    "packed, compiled": lambda s, time: Mask(time, time, None, mx.array(s), None),
}


def compare(mask: Any, shape: Sizes, *, sinks: bool = False, cap: float | None = None) -> None:
    """Output and gradients of everything, that of an added mask among them, against torch's in float64."""
    import torch

    rows, heads, groups, time, length = shape
    given = [mx.random.normal((rows, heads, time, WIDTH))]
    given += [mx.random.normal((rows, groups, length, WIDTH)) for _ in range(2)]
    weight = mx.random.normal((rows, heads, time, WIDTH))
    added = isinstance(mask, mx.array) and mask.dtype != mx.bool_
    given += ([mask] if added else []) + ([mx.random.normal((heads,))] if sinks else [])

    def ours(q: mx.array, k: mx.array, v: mx.array, *more: mx.array) -> tuple[mx.array, mx.array]:
        sink = more[-1] if sinks else None
        output = attention(q, k, v, None, 0.3, more[0] if added else mask, sink, cap)
        return (output * weight).sum(), output

    (_, found), slopes = mx.value_and_grad(ours, argnums=tuple(range(len(given))))(*given)
    exact = [torch.tensor(np.array(x), dtype=torch.float64, requires_grad=True) for x in given]
    q, k, v, *more = exact
    scores = q @ k.repeat_interleave(heads // groups, 1).mT * 0.3
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    array = Mask(time, length).array if mask == "causal" else mask
    if added:
        scores = scores + more[0]
    elif array is not None:
        array = array.array if isinstance(array, Mask) else array
        scores = scores.masked_fill(~torch.tensor(np.array(array)), -1e300)
    if sinks:
        sink = more[-1].reshape(1, heads, 1, 1).expand(rows, heads, time, 1)
        scores = torch.cat([scores, sink], -1)
    output = torch.softmax(scores, -1)[..., :length] @ v.repeat_interleave(heads // groups, 1)
    (output * torch.tensor(np.array(weight), dtype=torch.float64)).sum().backward()
    for name, one, other in zip("oqkvmm", [found, *slopes], [output.detach(), *(x.grad for x in exact)]):
        assert np.abs(np.array(one) - other.numpy()).max() < 1e-5, name


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(2, 4, 2, 100, 100), (1, 3, 1, 70, 90), (2, 2, 2, 1, 40)])
def test_against_float64(mask: str, shape: Sizes) -> None:
    mx.random.seed(0)
    rows, heads, _, time, length = shape
    compare(MASKS[mask](rows, heads, time, length), shape)


@pytest.mark.parametrize("mask", ["none", "causal", "window", "by row", "added to keys"])
def test_caps_and_sinks(mask: str) -> None:
    mx.random.seed(0)
    shape = (2, 4, 2, 60, 75)
    compare(MASKS[mask](2, 4, 60, 75), shape, sinks=True)
    compare(MASKS[mask](2, 4, 60, 75), shape, cap=2.0)


@pytest.mark.parametrize("mask", PACKED)
def test_packed_rows(mask: str) -> None:
    mx.random.seed(0)
    compare(PACKED[mask](starts(2, 100), 100), (2, 4, 2, 100, 100))


def test_half_precision_is_summed_in_float32() -> None:
    mx.random.seed(0)
    q, k, v = (mx.random.normal((1, 2, 90, WIDTH)).astype(mx.bfloat16) for _ in range(3))
    found = attention(q, k, v, None, 0.3, "causal")
    exact = base.scaled_dot_product_attention(*(x.astype(mx.float32) for x in (q, k, v)), None, 0.3, "causal")
    assert found.dtype == mx.bfloat16
    assert mx.abs(found - exact).max().item() < 2**-8 * mx.abs(exact).max().item()


@pytest.mark.parametrize(
    ("mask", "cells"),
    [
        (None, 4 * 2),
        (Mask(64, 64), 6),  # the lower triangle of 4 x 2 blocks
        (Mask(64, 64, window=2), 5),
        (Mask(64, 64, None, mx.zeros((1, 64)), np.repeat([[0, 32]], 32, axis=1)), 4),
        (Mask(64, 64, None, mx.zeros((1, 64)), None), 6),
    ],
)
def test_what_is_hidden_is_not_computed(mask: Mask | None, cells: int) -> None:
    x = mx.zeros((1, 2, 64, WIDTH))
    plan = blocks.Blocks(x, x, 1.0, mask, None, sinks=False)
    found = [cell for block in plan.query_blocks for cell in plan._row(block)]
    assert len(found) == cells
    if mask is not None:  # what is called whole is whole
        assert all(cell.partly or bool(mask.block(cell.queries, cell.keys).all()) for cell in found)


def test_masks_are_those_of_mlx_lm() -> None:
    for window in (None, 3):
        assert mx.array_equal(Mask(6, 9, window).array, base.create_causal_mask(6, 3, window))
    cache = ExampleCache(mx.array([[0, 0, 0, 3, 3], [0, 0, 2, 2, 2]]))
    packed = create_attention_mask(mx.zeros((2, 5, 4)), cache)
    assert packed.shape == (2, 1, 5, 5)
    assert packed.array[0, 0].astype(mx.int32).sum(axis=-1).tolist() == [1, 2, 3, 1, 2]
    assert mx.where(packed, 1, 0)[1, 0].sum(axis=-1).tolist() == [1, 2, 1, 2, 3], "MLX takes it as an array"


def test_memory_grows_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def peak(time: int) -> int:
        x = mx.random.normal((1, 2, time, 16))
        gradient = mx.grad(lambda x: attention(x, x, x, None, 0.3, "causal").sum())
        mx.eval(x)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(gradient(x))
        return mx.get_peak_memory() - before

    short, long = peak(1024), peak(4096)
    assert long < 6 * short, "four times, and not sixteen"
    assert long < 2 * 4096 * 4096 * 4 / 4, "the scores alone take four times as much"


def test_a_model_with_windows_and_sinks_also_where_blocks_are_computed_again() -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "sliding_window": 9}
    sizes |= {"num_local_experts": 2, "num_experts_per_tok": 2}
    model = gpt_oss.Model(gpt_oss.ModelArgs("gpt_oss", **sizes))
    mx.random.seed(0)
    model.update(nn.utils.tree_map(lambda x: mx.random.normal(x.shape) * 0.3, model.parameters()))
    ids = mx.random.randint(0, 50, (2, 70))

    def slopes() -> dict[str, mx.array]:
        def loss() -> mx.array:
            return nn.losses.cross_entropy(model(ids), ids).mean()

        return dict(tree_flatten(nn.value_and_grad(model, loss)()[1]))

    plain = slopes()
    called.rebind(model)
    names = type(model.layers[0].self_attn).__call__.__globals__
    assert names["scaled_dot_product_attention"] is attention
    for found in (slopes(), Recompute(model)(slopes)()):
        for name, expected in plain.items():
            assert mx.allclose(found[name], expected, rtol=1e-5, atol=1e-5), name
