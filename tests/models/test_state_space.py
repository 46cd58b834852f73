"""Mamba-2's state space in chunks, against one step per token and against mlx-lm's chunks."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import samples
from mlx_lm.models import ssm
from recurrences import accurate_exp, padded, slopes

from mlx_adapters.models.recurrent.install import in_chunks, ssm_update
from mlx_adapters.models.recurrent.state_space import state_space

ROWS, GROUPS, HEADS, WIDTH, SIZE = 2, 2, 4, 8, 16


def given(time: int, kind: mx.Dtype) -> tuple[list[mx.array], mx.array]:
    """x, log a, b, c, a state, and a mask with padding at either end; decays from e^-150 to 1 - 6e-6."""
    random = np.random.default_rng(time)
    arrays = [
        random.standard_normal((ROWS, time, HEADS, WIDTH)),
        -np.exp(random.uniform(-12, 5, (ROWS, time, HEADS))),
        random.standard_normal((ROWS, time, GROUPS, SIZE)),
        random.standard_normal((ROWS, time, GROUPS, SIZE)),
        random.standard_normal((ROWS, HEADS, WIDTH, SIZE)),
    ]
    return [mx.array(array, dtype=kind) for array in arrays], padded(time)


def step_by_step(x: Any, log_a: Any, b: Any, c: Any, state: Any, mask: Any) -> tuple[mx.array, mx.array]:
    outputs = []
    b, c = (mx.repeat(array, HEADS // GROUPS, axis=2) for array in (b, c))
    for t in range(x.shape[1]):
        new = mx.exp(log_a[:, t, :, None, None]) * state + x[:, t, :, :, None] * b[:, t, :, None]
        state = mx.where(mask[:, t, None, None, None], new, state)
        outputs.append((state * c[:, t, :, None]).sum(axis=-1))
    return mx.stack(outputs, axis=1), state


@pytest.mark.parametrize(("kind", "tolerance"), [(mx.float64, 1e-10), (mx.float32, 1e-5)])
@pytest.mark.parametrize("time", [1, 5, 64, 150])
def test_values_and_gradients_are_those_of_one_step_per_token(
    time: int, kind: mx.Dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "exp", accurate_exp)
    with mx.stream(mx.cpu):
        arrays, mask = given(time, kind)
        found, expected = slopes(state_space, arrays, mask), slopes(step_by_step, arrays, mask)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == kind
            assert mx.abs(one - other).max().item() <= tolerance * max(1, mx.abs(other).max().item())


@pytest.mark.parametrize("ragged", [False, True])
def test_it_takes_and_returns_what_mlx_lms_does(ragged: bool) -> None:
    (x, dt, b, c, state), _ = given(70, mx.float32)
    a_log, d, bias = (mx.random.normal((HEADS,), key=mx.random.key(n)) for n in range(3))
    lengths = mx.array([70, 41]) if ragged else None
    mask = mx.arange(70) < lengths[:, None] if lengths is not None else None
    arguments = (x, a_log, b, c, d, dt, bias, state, (0.01, 4.0), mask, lengths)
    found, expected = ssm_update(*arguments), ssm.ssm_update(*arguments)
    seen = mx.ones((ROWS, 70), mx.bool_) if mask is None else mask
    apart = mx.where(seen[..., None, None], found[0] - expected[0], 0)
    assert mx.abs(apart).max().item() <= 1e-5 * mx.abs(expected[0]).max().item()
    assert mx.abs(found[1] - expected[1]).max().item() <= 1e-5 * mx.abs(expected[1]).max().item()


@pytest.mark.parametrize("name", ["mamba2", "nemotron_h", "falcon_h1", "granitemoehybrid", "plamo2"])
def test_a_model_computes_in_chunks_of_64(name: str) -> None:
    ids = mx.random.randint(0, 64, (2, 70), key=mx.random.key(1))
    plain, ours = samples.sample(name), samples.sample(name)
    in_chunks(ours)
    assert any(
        method.__globals__.get("ssm_update") is ssm_update
        for module in ours.modules()
        for method in vars(type(module)).values()
        if hasattr(method, "__globals__")
    )
    expected = plain(ids)
    assert mx.abs(ours(ids) - expected).max().item() <= 1e-4 * mx.abs(expected).max().item()
