"""The CPU's own exponentials and SwiGLU against MLX's, in value and gradient; who calls them."""

import io
import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import activations, llama

from mlx_adapters import device
from mlx_adapters.cpu.exponential import exp, exp2, rebind, swiglu

pytestmark = pytest.mark.skipif(not device.on_cpu(), reason="only a CPU computes with these")


def test_the_exponential() -> None:
    x = np.linspace(-87.3, 88, 100_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(np.array(exp(mx.array(x))) - exact) / exact) < 2e-7


@pytest.mark.parametrize("compiled", [False, True])
def test_the_exponential_at_its_ends(compiled: bool) -> None:
    function = mx.compile(exp) if compiled else exp
    found = function(mx.array([0.0, -0.0, -88.0, -3e38, -math.inf, 500.0, math.inf, math.nan])).tolist()
    assert found[:5] == [1, 1, 0, 0, 0], "what a mask hides has no weight at all"
    assert found[5] == found[6] == pytest.approx(math.exp(88), rel=1e-6)
    assert math.isnan(found[7]), "a loss that is no number must not be hidden"


@pytest.mark.parametrize("compiled", [False, True])
def test_powers_of_two(compiled: bool) -> None:
    function = mx.compile(exp2) if compiled else exp2
    x = np.linspace(-126, 0, 100_001, dtype=np.float32)
    exact = 2.0 ** x.astype(np.float64)
    assert np.max(np.abs(np.array(function(mx.array(x))) - exact) / exact) < 3e-7
    found = function(mx.array([0.0, -127.0, -500.0, -3e38, math.nan])).tolist()
    assert found[:4] == [pytest.approx(1, abs=2e-7), 0, 0, 0], "what a mask hides has no weight at all"
    assert math.isnan(found[4])


def test_one_pass_where_gradients_are_taken() -> None:
    x = mx.random.normal((200, 200), key=mx.random.key(0))
    graph = io.StringIO()
    mx.export_to_dot(graph, mx.grad(lambda gate: swiglu(gate, x).sum())(x))
    assert "Compiled" in graph.getvalue()


def slopes(function: Any, *given: mx.array) -> list[mx.array]:
    """Value and gradients of a sum that weighs every output differently."""
    shape = function(*given).shape
    weight = mx.random.normal(shape, key=mx.random.key(9))
    numbers = tuple(range(len(given)))
    value, found = mx.value_and_grad(lambda *x: (function(*x) * weight).sum(), argnums=numbers)(*given)
    return [value, *found]


def equal(found: list[mx.array], expected: list[mx.array]) -> bool:
    return all(mx.allclose(a, b, rtol=1e-5, atol=1e-5).item() for a, b in zip(found, expected, strict=True))


def test_swiglu_and_its_gradient() -> None:
    gate, up = mx.random.normal((7, 30), key=mx.random.key(0)) * 20, mx.random.normal((7, 30))
    assert equal(slopes(swiglu, gate, up), slopes(activations.swiglu, gate, up))


def test_other_types_take_mlx_s_way() -> None:
    x = mx.random.normal((1, 2, 3, 8)).astype(mx.bfloat16)
    assert swiglu(x, x).dtype == mx.bfloat16


def test_layers_call_them_and_mlx_lm_stays_as_it_is() -> None:
    def model() -> Any:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24, "num_attention_heads": 2}
        mx.random.seed(0)
        return llama.Model(llama.ModelArgs("llama", **sizes, rms_norm_eps=1e-5, vocab_size=30))

    ours, plain = model(), model()
    call = llama.MLP.__call__
    rebind(ours)
    assert llama.MLP.__call__ is call
    found, kind = ours.layers[0].mlp, llama.MLP
    assert isinstance(found, kind)
    assert type(found) is not kind
    assert (type(found).__name__, type(found).__module__) == (kind.__name__, kind.__module__)
    names = type(ours.layers[0].mlp).__call__.__globals__
    assert names["swiglu"] is swiglu
    assert llama.MLP.__call__.__globals__["swiglu"] is activations.swiglu
    ids = mx.array([[3, 1, 4, 1, 5]])
    assert mx.allclose(ours(ids), plain(ids), atol=1e-6).item()
    before = type(ours.layers[0].mlp)
    rebind(ours)
    assert type(ours.layers[0].mlp) is before, "twice is once"
