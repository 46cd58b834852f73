"""Puts the chunked forms where a model computes token by token."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta, ssm

from mlx_adapters.models.recurrent import delta_rule, state_space
from mlx_adapters.rebind import rebind

__all__ = ["gated_delta_update", "in_chunks", "ssm_update"]

_SHORT = 8  # tokens up to which one step each is as fast


def in_chunks(model: nn.Module) -> None:
    """Let the recurrent layers of `model` compute in chunks where mlx-lm goes token by token.

    What such a layer is shows in the function that its code calls, whatever the architecture's name.
    """
    rebind(model, _REPLACED)


def gated_delta_update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,
    **options: Any,
) -> tuple[mx.array, mx.array]:
    """In place of `mlx_lm.models.gated_delta.gated_delta_update`, arguments and results alike.

    mlx-lm's Metal kernel, which has no gradient, keeps what it can compute.
    """
    width = k.shape[-1]
    metal = use_kernel and mx.default_device() == mx.gpu and mx.metal.is_available() and width % 32 == 0
    if metal or q.shape[1] <= _SHORT:
        found: tuple[mx.array, mx.array] = gated_delta.gated_delta_update(
            q, k, v, a, b, A_log, dt_bias, state, mask, use_kernel=use_kernel, **options
        )
        return found
    log_g, beta = _gates(a, b, A_log, dt_bias, **options)
    return delta_rule.gated_delta(q, k, v, log_g, beta, state, mask)


def _gates(
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, mx.array]:
    """(logarithms of the gates, beta) as mlx-lm has them, before the exponential."""
    beta = mx.sigmoid(b) * (2.0 if allow_neg_eigval else 1.0)
    rate = mx.exp(A_log.astype(mx.float32))
    if lower_bound is None:
        return -rate * nn.softplus(a + dt_bias), beta
    return lower_bound * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias)), beta


def ssm_update(
    hidden_states: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    time_step_limit: tuple[float, float] = (0.001, 100.0),
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """In place of `mlx_lm.models.ssm.ssm_update`, arguments and results alike.

    The mask alone says what is padding: mlx-lm's needs the lengths as well, which not every model gives it.
    """
    time = hidden_states.shape[1]
    if time == 1 and mask is None:
        found: tuple[mx.array, mx.array] = ssm.ssm_update(
            hidden_states, A_log, B, C, D, dt, dt_bias, state, time_step_limit
        )
        return found
    if lengths is not None:
        within = mx.arange(time) < lengths[:, None]
        mask = within if mask is None else mask & within
    dt = ssm.compute_dt(dt, dt_bias, time_step_limit)
    log_a = -mx.exp(A_log.astype(dt.dtype)) * dt
    y, state = state_space.state_space(dt[..., None] * hidden_states, log_a, B, C, state, mask)
    return (y + hidden_states * D[:, None]).astype(hidden_states.dtype), state


_REPLACED: dict[Callable[..., Any], Callable[..., Any]] = {
    gated_delta.gated_delta_update: gated_delta_update,
    ssm.ssm_update: ssm_update,
}
