"""Mamba-2's state space in chunks. Dao and Gu 2024, https://arxiv.org/abs/2405.21060

    S_i = a_i S_(i-1) + b_i x_i^T,   y_i = S_i^T c_i

It is the recurrence of `chunks` with the input as it is. mlx-lm computes it in chunks of 256 with four arrays
of a chunk's square for every head; 64 need a fourth of that memory.
"""

import mlx.core as mx

from mlx_adapters.models.recurrent import chunks

__all__ = ["state_space"]


def state_space(
    x: mx.array,
    log_a: mx.array,
    b: mx.array,
    c: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    chunk: int = chunks.CHUNK,
) -> tuple[mx.array, mx.array]:
    """The outputs of the state space without its direct path, and the state after the last token.

    Args:
        x: inputs times their time steps [rows, time, heads, width].
        log_a: logarithms of the decays [rows, time, heads]; at most 0.
        b: [rows, time, groups, state size]; a group serves as many heads as come to it.
        c: shaped alike.
        state: [rows, heads, width, state size]; zero by default.
        mask: [rows, time], false for tokens that leave the state alone.
        chunk: tokens that are computed at once, a power of two.

    Returns:
        Outputs shaped as `x` in float32, and the state in the type of the one that was given.
    """
    layout = chunks.Layout(b, x, chunk)
    log_a = log_a[..., None]
    if mask is not None:
        hidden = mask[..., None, None]
        x, log_a = mx.where(hidden, x, 0), mx.where(hidden, log_a, 0)
    x, log_a, b, c = (layout.split(array) for array in (x, log_a, b, c))
    start = mx.exp(mx.cumsum(log_a, axis=-2))
    rest = mx.exp(mx.cumsum(log_a, axis=-2, reverse=True, inclusive=False))
    inner = chunks.products(c, b, log_a)
    y, last = chunks.through_chunks(
        layout.start(state), x, None, inner, start * c, rest * b, start[..., -1:, :]
    )
    return layout.joined(y), layout.end(last, state)
