"""What the chunked forms of recurrent layers share: a state per head that gates shrink and keys fill.

    S_i = g_i S_(i-1) + k_i u_i^T,   y_i = S_i^T q_i

In a chunk that starts from S, with D_ij the product of g_(j+1) .. g_i for j <= i, and d_i that of g_1 .. g_i:

    y = d (q S) + (D * q k^T) u,   S' = d_last S + (D_last k)^T u

Gates are multiplied as sums of their logarithms, each sum over its own stretch: a difference of two sums
from the start of the chunk would lose what a gate near 0 has pushed out of the precision.
"""

import mlx.core as mx

__all__ = ["CHUNK", "Layout", "products", "through_chunks"]

CHUNK = 64


class Layout:
    """Arrays of tokens as arrays of chunks, and back.

    Args:
        k: keys [rows, time, key heads, key width].
        v: values [rows, time, value heads, value width]; a key head serves as many value heads as come to it.
        chunk: tokens that are computed at once, a power of two.
    """

    def __init__(self, k: mx.array, v: mx.array, chunk: int) -> None:
        self.rows, self.time, self.heads, self.width = k.shape
        self.values = v.shape[2:]
        self.group = self.values[0] // self.heads
        self.kind = mx.float64 if v.dtype == mx.float64 else mx.float32
        self.chunk = min(chunk, 1 << (self.time - 1).bit_length())
        self.count = -(-self.time // self.chunk)

    def split(self, x: mx.array) -> mx.array:
        """x [rows, time, heads, ..] as [chunks, rows, key heads, value heads of each or 1, time in chunk,
        ..], with zeros after the last token."""
        missing = self.count * self.chunk - self.time
        x = mx.pad(x.astype(self.kind), [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])
        x = x.reshape(self.rows, self.count, self.chunk, self.heads, -1, *x.shape[3:])
        return x.transpose(1, 0, 3, 4, 2, *range(5, x.ndim))

    def joined(self, y: mx.array) -> mx.array:
        """The inverse of `split` for values."""
        y = y.transpose(1, 0, 4, 2, 3, 5)
        return y.reshape(self.rows, self.count * self.chunk, *self.values)[:, : self.time]

    def start(self, state: mx.array | None) -> mx.array:
        """mlx-lm's state [rows, value heads, value width, key width] as `through_chunks` wants it."""
        width = self.values[1]
        if state is None:
            return mx.zeros((self.rows, self.heads, self.group, self.width, width), self.kind)
        state = state.astype(self.kind).reshape(self.rows, self.heads, self.group, width, self.width)
        return state.swapaxes(-1, -2)

    def end(self, state: mx.array, given: mx.array | None) -> mx.array:
        """The state as mlx-lm keeps it, in the type of the one that was given."""
        state = state.swapaxes(-1, -2).reshape(self.rows, *self.values, self.width)
        return state if given is None else state.astype(given.dtype)


def products(x: mx.array, k: mx.array, log_g: mx.array) -> mx.array:
    """D_ij x_i.k_j for j <= i, else 0; one gate a token."""
    length = log_g.shape[-2]
    rows, columns = mx.arange(length)[:, None], mx.arange(length)
    sums = mx.cumsum(mx.where(rows > columns, log_g, 0), axis=-2)
    return mx.where(rows >= columns, mx.exp(sums), 0) * (x @ k.swapaxes(-1, -2))


def through_chunks(
    state: mx.array,
    u: mx.array,
    w: mx.array | None,
    inner: mx.array,
    q: mx.array,
    k: mx.array,
    decay: mx.array,
) -> tuple[mx.array, mx.array]:
    """The outputs of all chunks, one after the other, and the last state [.., key width, value width].

    Args:
        u: what the keys write, before the part that depends on the state, u - w S; without `w` there is none.
        inner: D * q k^T.
        q: d q.
        k: D_last k.
        decay: d_last.
    """
    # mx.split, not slices: the gradient of each slice would be as large as the whole array
    given = [x for x in (u, inner, q, k, decay, w) if x is not None]
    outputs = []
    for part in zip(*(mx.split(x, x.shape[0]) for x in given)):
        u, inner, q, k, decay, *removed = (x[0] for x in part)
        u = u - removed[0] @ state if removed else u
        outputs.append(q @ state + inner @ u)
        state = decay * state + k.swapaxes(-1, -2) @ u
    return mx.stack(outputs), state
