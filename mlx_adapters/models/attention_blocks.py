"""Attention in blocks: scores of some queries and some keys at a time, never of all.

Dao et al. 2022, https://arxiv.org/abs/2205.14135, in MLX's operations. For each block of queries

    S = q k^T,  m = row maxima so far,  E = e^(S - m),  z = row sums of E,  o = E v / z

go from one block of keys to the next, and what was summed is scaled down where m rises. Only o, m and z are
kept. The gradient computes S and E again; with c = do / z:

    dv = E^T c,  dS = E * (c v^T - rowsum(c * o)),  dq = dS k,  dk = dS^T q

so memory grows with a row's length, not with its square. Blocks that the mask hides are not computed. A cap
makes S = cap tanh(q k^T / cap); a sink is one more score in m and z, whose value is nothing.

Exponentials are powers of two: the scale of the queries takes log2(e) in. m and rowsum(c * o) are one more
column of q and c, against ones in k and v: the products then are S - m and the bracket of dS.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_adapters import device
from mlx_adapters.cpu.exponential import exp2
from mlx_adapters.cpu.fused import fused
from mlx_adapters.models.masks import Mask

__all__ = ["HIDDEN", "SCORES", "Blocks", "by_group"]

HIDDEN = -3.0e38  # a score that no real one reaches
# Queries and keys of a block. On a CPU its scores stay in the cache; a GPU wants larger products.
_QUERIES, _KEYS = {"cpu": 128, "gpu": 512}, {"cpu": 256, "gpu": 1024}
SCORES = 1 << 18  # few queries take more keys at once: up to so many scores

Range = tuple[int, int]


def by_group(mask: mx.array, groups: int) -> mx.array:
    """A mask that broadcasts against [rows, heads, time, length], for [rows, groups, heads of a group, time,
    length]."""
    mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    if mask.shape[1] == 1:
        return mask[:, :, None]
    return mask.reshape(mask.shape[0], groups, -1, *mask.shape[2:])


@fused
def _powers(x: mx.array) -> mx.array:
    return exp2(x)


@fused
def _slopes(x: mx.array, w: mx.array) -> tuple[mx.array, mx.array]:
    """2^x, and that times w."""
    return exp2(x), exp2(x, w)


def _one_more(x: mx.array, column: mx.array | float) -> mx.array:
    """x [.., n, width] with one more column."""
    if not isinstance(column, mx.array):
        column = mx.full((*x.shape[:-1], 1), column)
    return mx.concatenate([x, column], axis=-1)


def _with_more(
    sums: tuple[mx.array, mx.array, mx.array] | None, x: mx.array, v: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """E v, m and z of a block of queries, after some more keys with the scores x and values v."""
    top = x.max(axis=-1, keepdims=True)
    m = top if sums is None else mx.maximum(sums[1], top)
    e = _powers(x - m)
    o, z = e @ v, e.sum(axis=-1, keepdims=True)
    if sums is None:
        return o, m, z
    less = _powers(sums[1] - m)
    return sums[0] * less + o, m, sums[2] * less + z


@dataclass(frozen=True)
class _Cell:
    """Some queries and some keys, [first, last): the number of the block of keys, and whether the mask hides
    a part."""

    queries: Range
    keys: Range
    number: int
    partly: bool


class Blocks:
    """One call of attention: its sizes, and which blocks it computes."""

    def __init__(
        self,
        queries: mx.array,
        keys: mx.array,
        scale: float,
        mask: Mask | None,
        cap: float | None,
        sinks: bool,
    ) -> None:
        self.rows, self.heads, self.time, _ = queries.shape
        self.groups, self.length = keys.shape[1:3]
        self.each = self.heads // self.groups
        self.mask, self.cap, self.sinks, self.scale = mask, cap, sinks, scale
        self.unit = math.log2(math.e)  # of the scores in E = 2^(unit S)
        kind = "cpu" if device.on_cpu() else "gpu"
        self.query_blocks = _split(self.time, _QUERIES[kind])
        at_once = self.rows * self.heads * (self.query_blocks[0][1] - self.query_blocks[0][0])
        self.key_blocks = _split(self.length, max(_KEYS[kind], SCORES // at_once))

    def attend(self, q: mx.array, k: mx.array, v: mx.array, *given: mx.array) -> mx.array:
        """The output [rows, heads, time, width of v]; `given` are a mask that is an array, and the sinks."""
        function = mx.custom_function(lambda *primals: self._forward(*primals))

        @function.vjp
        def pull(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
            found = self._backward(primals, cotangents[0], outputs)
            return tuple(slope.astype(primal.dtype) for slope, primal in zip(found, primals, strict=True))

        output: mx.array = function(q, k, v, *given)[0]  # type: ignore[index]
        return output

    # Forward ------------------------------------------------------------------------------------------------

    def _forward(
        self, queries: mx.array, keys: mx.array, values: mx.array, *given: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The output, and m and z in float32 [rows, groups, heads of a group, time, 1]."""
        q = self._queries(queries)
        k, v = (mx.contiguous(x.astype(mx.float32)) for x in (keys, values))
        hide, outputs, tops, totals = _Hiding(self, given), [], [], []
        after: list[mx.array] = []
        for block in self.query_blocks:
            own, sums = self._part(q, block), None
            for cell in self._row(block):
                own = mx.depends([own], after)[0] if after else own
                part = slice(*cell.keys)
                x = hide.of_scores(self._scores(own @ k[:, :, part].swapaxes(-1, -2)), cell)
                o, m, z = sums = _with_more(sums, x, v[:, :, part])
                after = [o, z]
            if self.sinks:
                sink = self._sink(given[-1], block)
                before, m = m, mx.maximum(m, sink)
                less = _powers(before - m)
                o, z = o * less, z * less + _powers(sink - m)
            outputs.append(self._whole(o / z, block))
            tops.append(self._whole(m, block))
            totals.append(self._whole(z, block))
        output = _joined(outputs).reshape(self.rows, self.heads, self.time, v.shape[-1])
        return output.astype(queries.dtype), _joined(tops), _joined(totals)

    # Backward -----------------------------------------------------------------------------------------------

    def _backward(self, primals: Sequence[mx.array], slope: mx.array, outputs: Any) -> list[mx.array]:
        """The gradients of all primals, in float32."""
        queries, keys, values, *given = primals
        output, m, z = outputs
        shape = (self.rows, self.groups, self.each, self.time)
        c = slope.astype(mx.float32).reshape(*shape, -1) / z
        drift = (c * output.astype(mx.float32).reshape(*shape, -1)).sum(axis=-1, keepdims=True)
        k, v = (mx.contiguous(x.astype(mx.float32)) for x in (keys, values))
        k_one, v_one = _one_more(k, 1.0) if self.cap is None else k, _one_more(v, 1.0)
        q, wide = self._queries(queries), _one_more(c, -drift)
        hide, after = _Hiding(self, given), list[mx.array]()
        dq, dk, dv = [], dict[int, mx.array](), dict[int, mx.array]()
        scores = _ScoreSlopes(self, given)
        for block in self.query_blocks:
            own, top, own_c = (self._part(x, block) for x in (q, m, wide))
            plain_c = mx.contiguous(own_c[..., :-1])
            against, total = own if self.cap is not None else _one_more(own, -top), mx.zeros_like(own)
            for cell in self._row(block):
                if after:
                    against, own_c = mx.depends([against, own_c], after)
                part = slice(*cell.keys)
                raw = against @ k_one[:, :, part].swapaxes(-1, -2)
                x = hide(raw if self.cap is None else self._scores(raw) - top, cell)
                e, ds = _slopes(x, own_c @ v_one[:, :, part].swapaxes(-1, -2))
                ds = hide.nothing(ds, cell)
                scores.add(ds, cell)
                if self.cap is not None:
                    ds = ds * (1 - mx.square(mx.tanh(raw)))
                total = total + ds @ k[:, :, part]
                _add(dk, cell.number, ds.swapaxes(-1, -2) @ own)
                _add(dv, cell.number, e.swapaxes(-1, -2) @ plain_c)
                after = [total, dk[cell.number], dv[cell.number]]
            dq.append(self._whole(total, block))
        by_query = _joined(dq).reshape(queries.shape) * self.scale
        by_key = self._by_key(dk, k) * (1 / self.unit if self.cap is None else self.cap)
        found = [by_query, by_key, self._by_key(dv, v)]
        if len(given) > int(self.sinks):
            found.append(scores.of_mask())
        if self.sinks:
            share = _powers(given[-1].astype(mx.float32).reshape(1, self.groups, -1, 1, 1) * self.unit - m)
            found.append(-(share * drift).sum(axis=(0, 3, 4)).reshape(given[-1].shape))
        return found

    # Parts --------------------------------------------------------------------------------------------------

    def _queries(self, queries: mx.array) -> mx.array:
        """[rows, groups, heads of a group, time, width] in float32, scaled so that `_scores` of the product
        with the keys are the exponents of two."""
        factor = self.scale * self.unit if self.cap is None else self.scale / self.cap
        q = queries.astype(mx.float32) * factor
        return q.reshape(self.rows, self.groups, self.each, self.time, -1)

    def _scores(self, product: mx.array) -> mx.array:
        return product if self.cap is None else mx.tanh(product) * (self.cap * self.unit)

    def _sink(self, sinks: mx.array, block: Range) -> mx.array:
        sink = sinks.astype(mx.float32).reshape(1, self.groups, self.each, 1, 1) * self.unit
        shape = (self.rows, self.groups, self.each, block[1] - block[0], 1)
        return mx.broadcast_to(sink, shape).reshape(self.rows, self.groups, -1, 1)

    def _part(self, x: mx.array, block: Range) -> mx.array:
        """The queries of a block, the heads of a group as rows of one matrix."""
        return mx.contiguous(x[:, :, :, slice(*block)].reshape(self.rows, self.groups, -1, x.shape[-1]))

    def _whole(self, x: mx.array, block: Range) -> mx.array:
        return x.reshape(self.rows, self.groups, self.each, block[1] - block[0], -1)

    def _row(self, block: Range) -> Iterator[_Cell]:
        """The blocks of keys that a block of queries sees."""
        begin, end = (0, self.length) if self.mask is None else self.mask.seen(*block)
        for number, keys in enumerate(self.key_blocks):
            if keys[0] < end and keys[1] > begin:
                partly = self.mask is not None and not self.mask.whole(block, keys)
                yield _Cell(block, keys, number, partly)

    def _by_key(self, parts: dict[int, mx.array], like: mx.array) -> mx.array:
        every = []
        for number, (first, last) in enumerate(self.key_blocks):
            nothing = mx.zeros((*like.shape[:2], last - first, like.shape[-1]))
            every.append(parts.get(number, nothing))
        return mx.concatenate(every, axis=2)


class _Hiding:
    """Applies the mask of a call to the scores of a block."""

    def __init__(self, blocks: Blocks, given: Sequence[mx.array]) -> None:
        self.blocks = blocks
        self.given = by_group(given[0], blocks.groups) if len(given) > int(blocks.sinks) else None
        self.made: dict[Any, mx.array] = {}

    def of_scores(self, x: mx.array, cell: _Cell) -> mx.array:
        """The scores x, which of padding may not be finite: adding would not hide those."""
        if self.given is None or self.given.dtype != mx.bool_:
            return self(x, cell)
        return mx.where(_of_block(self.given, cell), self._spread(x, cell), HIDDEN).reshape(x.shape)

    def __call__(self, x: mx.array, cell: _Cell) -> mx.array:
        """The scores x, or what they are above the maxima of their rows."""
        hidden = self._hidden(cell)
        if hidden is None:
            return x
        return (self._spread(x, cell) + hidden).reshape(x.shape)

    def nothing(self, ds: mx.array, cell: _Cell) -> mx.array:
        """Slopes of the scores of a block, 0 for those that a given mask hides: a query that sees nothing
        weighs all keys alike."""
        if self.given is None or self.given.dtype != mx.bool_:
            return ds
        seen = _of_block(self.given, cell)
        return mx.where(seen, self._spread(ds, cell), 0.0).reshape(ds.shape)

    def _hidden(self, cell: _Cell) -> mx.array | None:
        """What is added to the scores."""
        blocks, unit = self.blocks, self.blocks.unit
        if self.given is not None:
            part = _of_block(self.given, cell)
            if part.dtype == mx.bool_:
                return mx.where(part, 0.0, HIDDEN)
            return mx.maximum(part.astype(mx.float32) * unit, HIDDEN)
        if blocks.mask is None or not cell.partly:
            return None
        (first, last), (begin, end) = cell.queries, cell.keys
        alike = (first - begin, last - first, end - begin)  # all that a mask without examples depends on
        key = alike if blocks.mask.example_start is None else (cell.queries, cell.keys)
        if key not in self.made:
            seen = by_group(blocks.mask.block(cell.queries, cell.keys), blocks.groups)
            self.made[key] = mx.where(seen, 0.0, HIDDEN)
        return self.made[key]

    def _spread(self, x: mx.array, cell: _Cell) -> mx.array:
        blocks, (first, last) = self.blocks, cell.queries
        return x.reshape(blocks.rows, blocks.groups, blocks.each, last - first, -1)


class _ScoreSlopes:
    """The gradient of a mask that is added to the scores, which some models compute: it is there for all
    blocks together only where somebody asks for it."""

    def __init__(self, blocks: Blocks, given: Sequence[mx.array]) -> None:
        self.blocks = blocks
        self.mask = given[0] if len(given) > int(blocks.sinks) else None
        self.parts: dict[Range, list[mx.array]] = {}

    def add(self, ds: mx.array, cell: _Cell) -> None:
        if self.mask is not None and self.mask.dtype != mx.bool_:
            whole = ds.reshape(self.blocks.rows, self.blocks.heads, -1, ds.shape[-1])
            self.parts.setdefault(cell.queries, []).append(whole)

    def of_mask(self) -> mx.array:
        assert self.mask is not None
        if not self.parts:
            return mx.zeros_like(self.mask)
        rows = [mx.concatenate(row, axis=3) for row in self.parts.values()]
        slope = mx.concatenate(rows, axis=2)
        shape = [1] * (4 - self.mask.ndim) + list(self.mask.shape)
        alike = [axis for axis in range(4) if shape[axis] == 1 and slope.shape[axis] > 1]
        return slope.sum(axis=alike, keepdims=True).reshape(self.mask.shape)


def _split(count: int, size: int) -> list[Range]:
    """`count` things in parts of about `size`, all but the last of one size."""
    parts = max(1, round(count / size))
    each = -(-count // parts)
    return [(first, min(first + each, count)) for first in range(0, count, each)]


def _of_block(mask: mx.array, cell: _Cell) -> mx.array:
    """A part of a mask of five axes, of which some may be 1 long."""
    queries = slice(*cell.queries) if mask.shape[3] > 1 else slice(None)
    keys = slice(*cell.keys) if mask.shape[4] > 1 else slice(None)
    return mask[:, :, :, queries, keys]


def _joined(parts: list[mx.array]) -> mx.array:
    return mx.concatenate(parts, axis=3) if len(parts) > 1 else parts[0]


def _add(sums: dict[int, mx.array], number: int, more: mx.array) -> None:
    sums[number] = sums[number] + more if number in sums else more
