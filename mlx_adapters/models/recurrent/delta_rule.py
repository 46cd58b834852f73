"""The gated delta rule in chunks, in place of one step per token. Yang et al. 2024,
https://arxiv.org/abs/2412.06464

    S_i = g_i S_(i-1) + k_i u_i^T,   u_i = b_i (v_i - g_i S_(i-1)^T k_i),   y_i = S_i^T q_i

with a state S [key width, value width] per head. In a chunk that starts from S, with D_ij the product of
g_(j+1) .. g_i for j <= i, and d_i the product of g_1 .. g_i:

    (I + A) U = b v - b d (k S),   A_ij = b_i D_ij k_i.k_j for j < i
    y = d (q S) + (D * q k^T) U,   S' = d_last S + (D_last k)^T U

(I + A)^-1 does not depend on S: it is found for all chunks at once, and only two products a chunk wait for
the chunk before. Memory grows with the length times the chunk, not with a state per token.

Gates are multiplied as sums of their logarithms, each sum over its own stretch: a difference of two sums
from the start of the chunk would lose what a gate near 0 has pushed out of the precision.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

__all__ = ["CHUNK", "gated_delta"]

CHUNK = 64


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    chunk: int = CHUNK,
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
    rows, time, heads, width = k.shape
    values = v.shape[2:]
    kind = mx.float64 if v.dtype == mx.float64 else mx.float32
    stored = kind if state is None else state.dtype
    chunk = min(chunk, 1 << (time - 1).bit_length())
    count = -(-time // chunk)
    group = values[0] // heads

    log_g = log_g.reshape(*log_g.shape[:3], -1)
    if mask is not None:
        hidden = mask[..., None]
        beta = mx.where(hidden, beta, 0)
        log_g = mx.where(hidden[..., None], log_g, 0)

    def chunks(x: mx.array, own: int, *rest: int) -> mx.array:
        """[chunks, rows, key heads, value heads of each, time in chunk, ...], padded with zeros."""
        x = mx.pad(x.astype(kind), [(0, 0), (0, count * chunk - time), *[(0, 0)] * (x.ndim - 2)])
        x = x.reshape(rows, count, chunk, heads, own, *rest)
        return x.transpose(1, 0, 3, 4, 2, *range(5, x.ndim))

    pieces = _chunk_terms(
        chunks(q, 1, width),
        chunks(k, 1, width),
        chunks(v, group, values[1]),
        chunks(log_g, group, log_g.shape[3]),
        chunks(beta, group),
    )
    if state is None:
        start = mx.zeros((rows, heads, group, width, values[1]), kind)
    else:
        start = state.astype(kind).reshape(rows, heads, group, values[1], width).swapaxes(-1, -2)
    y, last = _through_chunks(start, *pieces)
    y = y.transpose(1, 0, 4, 2, 3, 5).reshape(rows, count * chunk, *values)[:, :time]
    if mask is not None:
        y = mx.where(mask[..., None, None], y, 0)
    last = last.swapaxes(-1, -2).reshape(rows, values[0], values[1], width)
    return y.astype(q.dtype), last.astype(stored)


def _chunk_terms(
    q: mx.array, k: mx.array, v: mx.array, log_g: mx.array, beta: mx.array
) -> tuple[mx.array, ...]:
    """What needs no state, of all chunks at once: (b v after the inverse, b d k after it, D * q k^T, d q,
    D_last k, d_last). `log_g` [.., time in chunk, 1 or key width]."""
    products = _products if log_g.shape[-1] == 1 else _products_by_channel
    inner, outer = products(q, k, log_g), products(k, k, log_g)
    start = mx.exp(mx.cumsum(log_g, axis=-2))
    rest = mx.exp(mx.cumsum(log_g, axis=-2, reverse=True, inclusive=False))
    beta = beta[..., None]
    inverse: Any = unit_lower_inverse(beta * outer)
    u, w = inverse @ (beta * v), inverse @ (beta * start * k)
    return u, w, inner, start * q, rest * k, start[..., -1:, :].swapaxes(-1, -2)


def _products(x: mx.array, k: mx.array, log_g: mx.array) -> mx.array:
    """D_ij x_i.k_j for j <= i, else 0; one gate a token."""
    length = log_g.shape[-2]
    rows, columns = mx.arange(length)[:, None], mx.arange(length)
    sums = mx.cumsum(mx.where(rows > columns, log_g, 0), axis=-2)
    return mx.where(rows >= columns, mx.exp(sums), 0) * (x @ k.swapaxes(-1, -2))


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


def _through_chunks(
    state: mx.array, u: mx.array, w: mx.array, inner: mx.array, q: mx.array, k: mx.array, decay: mx.array
) -> tuple[mx.array, mx.array]:
    """The outputs of all chunks, one after the other, and the last state [.., key width, value width]."""
    # mx.split, not slices: the gradient of each slice would be as large as the whole array
    parts = zip(*(mx.split(x, x.shape[0]) for x in (u, w, inner, q, k, decay)))
    outputs = []
    for u, w, inner, q, k, decay in ([x[0] for x in part] for part in parts):
        u = u - w @ state
        outputs.append(q @ state + inner @ u)
        state = decay * state + k.swapaxes(-1, -2) @ u
    return mx.stack(outputs), state


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
