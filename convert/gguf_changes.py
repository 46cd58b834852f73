"""Undo what llama.cpp's converter does to the values or the order of a tensor.

A `Change` takes a tensor as it is in the file and the model's configuration, and gives it as MLX's module has
it. It raises ValueError where the tensor does not have the shape that the configuration says.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_adapters.convert.gguf_blocks import Groups, dense

__all__ = [
    "Change",
    "Matrix",
    "by_key_head",
    "chained",
    "convolution",
    "flat",
    "halves",
    "joined",
    "log_of_negative",
    "minus_one",
    "one_row",
    "rows",
    "rows_of",
    "shared_out",
    "untiled",
]

Matrix = Groups | mx.array
"""A tensor: [..., rows, columns] in the groups of its blocks, or plain."""
Change = Callable[[Matrix, dict[str, Any]], Matrix]
_Order = NDArray[np.int64]


# Rows and columns ------------------------------------------------------------------------------------------


def rows_of(matrix: Matrix) -> int:
    """The number of rows; of a vector its length."""
    shape = matrix.codes.shape if isinstance(matrix, Groups) else matrix.shape
    return int(shape[-2] if len(shape) > 1 else shape[0])


def rows(matrix: Matrix, order: _Order | slice) -> Matrix:
    """The rows of a matrix in another order."""
    if isinstance(matrix, Groups):
        return matrix.rows(order)
    index: Any = order if isinstance(order, slice) else mx.array(order)
    return matrix[index] if matrix.ndim == 1 else matrix[..., index, :]


def _columns(matrix: Matrix, order: _Order) -> Matrix:
    if isinstance(matrix, Groups):
        moved = matrix.columns(order)
        if moved is not None:
            return moved
        matrix = dense(matrix)
    return matrix[..., mx.array(order)]


def shared_out(matrix: Matrix, parts: int) -> list[Matrix]:
    """The rows in equal parts."""
    size, rest = divmod(rows_of(matrix), parts)
    if rest:
        raise ValueError(f"has {rows_of(matrix)} rows, not {parts} equal parts")
    return [rows(matrix, slice(part * size, (part + 1) * size)) for part in range(parts)]


def joined(parts: Sequence[Matrix]) -> Matrix:
    """The rows of several matrices one after the other."""
    if isinstance(parts[0], Groups):
        alike = [part for part in parts if isinstance(part, Groups) and part.like(parts[0])]
        if len(alike) == len(parts):
            return Groups.joined(alike)
    plain = [dense(part) if isinstance(part, Groups) else part for part in parts]
    return mx.concatenate(plain, axis=-2)


# Changes ---------------------------------------------------------------------------------------------------


def chained(*steps: Change) -> Change:
    """Several changes one after the other."""

    def change(matrix: Matrix, config: dict[str, Any]) -> Matrix:
        for step in steps:
            matrix = step(matrix, config)
        return matrix

    return change


def halves(heads: str) -> Change:
    """The rows of `config[heads]` heads: llama.cpp pairs neighbours, Hugging Face pairs the two halves."""

    def change(matrix: Matrix, config: dict[str, Any]) -> Matrix:
        count, width, found = config[heads], config["head_dim"], rows_of(matrix)
        if found != count * width or width % 2:
            raise ValueError(f"has {found} rows, not {count} heads of {width}")
        places = np.arange(found, dtype=np.int64).reshape(count, width // 2, 2)
        return rows(matrix, places.swapaxes(1, 2).reshape(-1))

    return change


def untiled(*, keys: bool = False, single: bool = False, columns: bool = False) -> Change:
    """The heads of values in linear attention by the head of keys that they belong to.

    llama.cpp has the first of every head of keys first, then the second of each, and so on. With `keys` the
    rows of queries and keys stand before them; with `single` a head is one row; with `columns` the columns
    are the heads.
    """

    def change(matrix: Matrix, config: dict[str, Any]) -> Matrix:
        heads, groups = config["linear_num_value_heads"], config["linear_num_key_heads"]
        width = 1 if single else config["linear_value_head_dim"]
        before = 2 * groups * config["linear_key_head_dim"] if keys else 0
        places = np.arange(heads * width, dtype=np.int64).reshape(heads // groups, groups, width)
        order = np.concatenate([np.arange(before), before + places.swapaxes(0, 1).reshape(-1)])
        if columns:
            return _columns(matrix, order)
        if rows_of(matrix) != len(order):
            raise ValueError(f"has {rows_of(matrix)} rows, not {len(order)}")
        return rows(matrix, order) if heads != groups else matrix

    return change


def by_key_head(matrix: Matrix, config: dict[str, Any]) -> Matrix:
    """Queries, keys, values and gates of linear attention: all of each head of keys together."""
    groups, key = config["linear_num_key_heads"], config["linear_key_head_dim"]
    value = config["linear_num_value_heads"] // groups * config["linear_value_head_dim"]
    if rows_of(matrix) != groups * 2 * (key + value):
        raise ValueError(f"has {rows_of(matrix)} rows, not {groups * 2 * (key + value)}")
    starts, parts = 0, []
    for width in (key, key, value, value):
        parts.append(starts + np.arange(groups * width, dtype=np.int64).reshape(groups, width))
        starts += groups * width
    return rows(matrix, np.concatenate(parts, axis=1).reshape(-1))


def minus_one(matrix: Matrix, config: dict[str, Any]) -> Matrix:
    """The weight of a norm that is stored as a difference from one."""
    return _plain(matrix).astype(mx.float32) - 1


def log_of_negative(matrix: Matrix, config: dict[str, Any]) -> Matrix:
    """The logarithm of a decay, of which the file holds the negative."""
    return mx.log(-_plain(matrix).astype(mx.float32))


def convolution(matrix: Matrix, config: dict[str, Any]) -> Matrix:
    """The kernels of a convolution along the text, [channels, width] to [channels, width, 1]."""
    plain = _plain(matrix)
    return plain if plain.ndim == 1 else plain.reshape(*plain.shape[-2:], 1)


def flat(matrix: Matrix, config: dict[str, Any]) -> Matrix:
    """A vector that the file has as a matrix."""
    return _plain(matrix).reshape(-1)


def one_row(matrix: Matrix, config: dict[str, Any]) -> Matrix:
    """A matrix of one row that the file may have as a vector."""
    return _plain(matrix).reshape(1, -1)


def _plain(matrix: Matrix) -> mx.array:
    return dense(matrix) if isinstance(matrix, Groups) else matrix
