"""The gated delta rule in chunks against mlx-lm's one step per token."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import samples
from mlx_lm.models.gated_delta import gated_delta_ops
from recurrences import accurate_exp, padded, slopes

from mlx_adapters import adapter, methods
from mlx_adapters.models.recurrent import install
from mlx_adapters.models.recurrent.delta_rule import gated_delta, unit_lower_inverse

ROWS, KEY_HEADS, VALUE_HEADS, KEYS, VALUES = 2, 2, 4, 16, 8


def given(time: int, kind: mx.Dtype, vector: bool) -> tuple[list[mx.array], mx.array]:
    """q, k, v, log g, beta, a state, and a mask with padding at either end. Gates run from e^-150 to
    1 - 6e-6, and keys are repeated."""
    random = np.random.default_rng(time)
    shape = (ROWS, time, KEY_HEADS, KEYS)
    k = random.standard_normal(shape)
    k[:, ::3] = k[:, :1]
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    gates = (ROWS, time, VALUE_HEADS, *[KEYS] * vector)
    beta = random.uniform(0, 1, gates[:3])
    beta[:, ::4] = 1
    arrays = [
        random.standard_normal(shape) / KEYS,
        k,
        random.standard_normal((ROWS, time, VALUE_HEADS, VALUES)),
        -np.exp(random.uniform(-12, 5, gates)),
        beta,
        random.standard_normal((ROWS, VALUE_HEADS, VALUES, KEYS)),
    ]
    return [mx.array(array, dtype=kind) for array in arrays], padded(time)


def step_by_step(q: Any, k: Any, v: Any, log_g: Any, beta: Any, state: Any, mask: Any) -> Any:
    y, last = gated_delta_ops(q, k, v, mx.exp(log_g), beta, state, mask)
    return mx.where(mask[..., None, None], y, 0), last


@pytest.mark.parametrize("vector", [False, True], ids=["gate per head", "gate per channel"])
@pytest.mark.parametrize(("kind", "tolerance"), [(mx.float64, 1e-10), (mx.float32, 1e-5)])
@pytest.mark.parametrize("time", [1, 5, 64, 150])
def test_values_and_gradients_are_those_of_one_step_per_token(
    time: int, kind: mx.Dtype, tolerance: float, vector: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "exp", accurate_exp)
    with mx.stream(mx.cpu):
        arrays, mask = given(time, kind, vector)
        found, expected = slopes(gated_delta, arrays, mask), slopes(step_by_step, arrays, mask)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == kind
            assert mx.abs(one - other).max().item() <= tolerance * max(1, mx.abs(other).max().item())


def test_a_repeated_key_does_not_break_the_inverse() -> None:
    lower = mx.tril(mx.ones((1, 64, 64)), -1)
    exact = np.linalg.inv(np.eye(64) + np.array(lower[0], np.float64))
    assert np.abs(np.array(unit_lower_inverse(lower)[0]) - exact).max() < 1e-6


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "olmo_hybrid", "kimi_linear", "bailing_moe_v3"])
def test_a_model_that_trains_computes_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = mx.random.randint(0, 64, (2, 40), key=mx.random.key(1))

    def gradients(model: nn.Module) -> mx.array:
        model.train()
        model.freeze()
        embeddings = next(m for m in model.modules() if isinstance(m, nn.Embedding))
        embeddings.unfreeze()
        found: Any = nn.value_and_grad(model, lambda: nn.losses.cross_entropy(model(ids), ids).mean())()
        leaf = [array for _, array in nn.utils.tree_flatten(found[1])]
        return mx.concatenate([array.flatten() for array in leaf])

    plain, ours, called = samples.sample(name), samples.sample(name), []
    chunked = install.delta_rule.gated_delta
    monkeypatch.setattr(
        install.delta_rule, "gated_delta", lambda *a, **k: called.append(1) or chunked(*a, **k)
    )
    adapter.attach(ours, methods.make("lora", {}), model_type=name)
    expected, found = gradients(plain), gradients(ours)
    assert called
    assert mx.abs(found - expected).max().item() <= 1e-5 * mx.abs(expected).max().item()
