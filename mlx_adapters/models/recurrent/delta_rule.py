"""The gated delta rule in chunks, in place of one step per token. Yang et al. 2024,
https://arxiv.org/abs/2412.06464

    S_i = g_i S_(i-1) + k_i u_i^T,   u_i = b_i (v_i - g_i S_(i-1)^T k_i),   y_i = S_i^T q_i

with a state S [key width, value width] per head. In a chunk that starts from S, with D_ij the product of
g_(j+1) .. g_i for j <= i, and d_i the product of g_1 .. g_i:

    (I + A) U = b v - b d (k S),   A_ij = b_i D_ij k_i.k_j for j < i
    y = d (q S) + (D * q k^T) U,   S' = d_last S + (D_last k)^T U

(I + A)^-1 does not depend on S: it is found for all chunks at once, and only two products a chunk wait for
the chunk before. Memory grows with the length times the chunk, not with a state per token.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from mlx_adapters.models.recurrent import chunks

__all__ = ["gated_delta", "unit_lower_inverse"]


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    chunk: int = chunks.CHUNK,
) -> tuple[mx.array, mx.array]:
    """The outputs of the gated delta rule, and the state after the last token.

    Args:
        q: queries [rows, time, key heads, key width], scaled already.
        k: keys, shaped alike.
        v: values [rows, time, value heads, value width]; a key head serves as many value heads as come to it.
        log_g: logarithms of the gates [rows, time, value heads], or one for each key channel in a fourth
            axis; at most 0.
        beta: [rows, time, value heads].
        state: [rows, value heads, value width, key width]; zero by default.
        mask: [rows, time], false for tokens that leave the state alone. Their outputs are 0.
        chunk: tokens that are computed at once, a power of two.

    Returns:
        Outputs [rows, time, value heads, value width] in the type of `q`, and the state in that of `state`.
    """
    layout = chunks.Layout(k, v, chunk)
    log_g = log_g.reshape(*log_g.shape[:3], -1)
    if mask is not None:
        hidden = mask[..., None]
        beta = mx.where(hidden, beta, 0)
        log_g = mx.where(hidden[..., None], log_g, 0)
    pieces = _chunk_terms(
        layout.split(q), layout.split(k), layout.split(v), layout.split(log_g), layout.split(beta)
    )
    y, last = chunks.through_chunks(layout.start(state), *pieces)
    y = layout.joined(y)
    if mask is not None:
        y = mx.where(mask[..., None, None], y, 0)
    return y.astype(q.dtype), layout.end(last, state)


def _chunk_terms(
    q: mx.array, k: mx.array, v: mx.array, log_g: mx.array, beta: mx.array
) -> tuple[mx.array, ...]:
    """What needs no state, of all chunks at once: (b v after the inverse, b d k after it, D * q k^T, d q,
    D_last k, d_last). `log_g` [.., time in chunk, 1 or key width]."""
    products = chunks.products if log_g.shape[-1] == 1 else _products_by_channel
    inner, outer = products(q, k, log_g), products(k, k, log_g)
    start = mx.exp(mx.cumsum(log_g, axis=-2))
    rest = mx.exp(mx.cumsum(log_g, axis=-2, reverse=True, inclusive=False))
    beta = beta[..., None]
    inverse: Any = unit_lower_inverse(beta * outer)
    u, w = inverse @ (beta * v), inverse @ (beta * start * k)
    return u, w, inner, start * q, rest * k, start[..., -1:, :].swapaxes(-1, -2)


def _products_by_channel(x: mx.array, k: mx.array, log_g: mx.array) -> mx.array:
    """The same with a gate for each key channel, which does not leave the product of the two.

    Where i and j lie in neighbouring blocks the gates from j to i are those from j to the end of its block,
    times those from there to i. Blocks of 1, 2, 4 .. meet every pair once, and no factor is above 1.
    """
    result = mx.eye(log_g.shape[-2], dtype=x.dtype) * (x * k).sum(axis=-1, keepdims=True)
    for half, joined in _joined_blocks(log_g.shape[-2]):
        blocks = log_g.reshape(*log_g.shape[:-2], -1, half, log_g.shape[-1])
        before = mx.exp(mx.cumsum(blocks, axis=-2)).reshape(log_g.shape)
        behind = mx.exp(mx.cumsum(blocks, axis=-2, reverse=True, inclusive=False)).reshape(log_g.shape)
        result = mx.where(joined, (before * x) @ (behind * k).swapaxes(-1, -2), result)
    return result


def _joined_blocks(size: int) -> Iterator[tuple[int, mx.array]]:
    """(1, 2, 4 .. below `size`, where in a matrix the second of two blocks so long meets the first)."""
    index, half = mx.arange(size), 1
    while half < size:
        block = index // half
        yield half, (block[:, None] == block + 1) & (block % 2 == 0)
        half *= 2


@mx.custom_function
def unit_lower_inverse(lower: mx.array) -> mx.array:
    """(I + A)^-1 for A the part of `lower` [.., n, n] below the diagonal, n a power of two.

    Blocks of 1, 2, 4 .. rows are joined in pairs, inverse of [[P, 0], [R, Q]] = [[P', 0], [-Q' R P', Q']]:
    what appears on the way are inverses of parts of the matrix. The shorter (I - A)(I + A^2)(I + A^4) .. is
    useless in float32: for a key that is repeated, A^n grows to 10^17 before it cancels.
    """
    inverse = mx.eye(lower.shape[-1], dtype=lower.dtype)
    for half, joined in _joined_blocks(lower.shape[-1]):
        part = mx.where(joined, lower, 0)
        inverse = inverse - (part if half == 1 else inverse @ part @ inverse)
    return mx.broadcast_to(inverse, lower.shape)


@unit_lower_inverse.vjp
def _inverse_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> mx.array:
    transposed = output.swapaxes(-1, -2)
    return mx.tril(-(transposed @ cotangent @ transposed), -1)
