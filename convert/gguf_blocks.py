"""The quantized blocks of GGUF as (codes, scales, biases): value = code * scale + bias, exactly.

Every block type is affine in small groups, as MLX's own quantization is. Where the groups have 32 values the
codes go into MLX's packing without loss; groups of 16 (Q2_K, Q3_K, Q6_K) MLX does not have.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCKS", "MLX_GROUP", "Block", "Groups", "dense", "packed"]

MLX_GROUP = 32
_Bytes = NDArray[Any]  # uint8 throughout; numpy's stubs take `bytes & 15` for a signed array
_Floats = NDArray[np.float32]
_Decoded = tuple[_Bytes, _Floats, _Floats]
_TWO_BITS = np.array([0, 2, 4, 6], dtype=np.uint8)


@dataclass(frozen=True)
class Groups:
    """A matrix as codes [rows, columns] with scales and biases [rows, columns / group] in float32."""

    codes: _Bytes
    scales: _Floats
    biases: _Floats
    bits: int

    @property
    def group(self) -> int:
        """How many values share one scale."""
        return int(self.codes.shape[-1] // self.scales.shape[-1])

    def rows(self, order: NDArray[np.int64]) -> "Groups":
        """The same matrix with its rows in another order."""
        return Groups(self.codes[order], self.scales[order], self.biases[order], self.bits)


@dataclass(frozen=True)
class Block:
    """A block type: how many values in how many bytes, and how to read blocks [n, width]."""

    values: int
    width: int
    bits: int
    decode: Callable[[_Bytes], _Decoded]

    def groups(self, data: _Bytes, rows: int) -> Groups:
        """Read a whole matrix of `rows` rows."""
        codes, scales, biases = self.decode(data.reshape(-1, self.width))
        shape = (rows, -1)
        return Groups(codes.reshape(shape), scales.reshape(shape), biases.reshape(shape), self.bits)


def dense(groups: Groups) -> mx.array:
    """The values in float32, computed when MLX needs them: until then only the codes take memory."""
    codes, scales, biases = (mx.array(part) for part in (groups.codes, groups.scales, groups.biases))
    cells = codes.reshape(*scales.shape, groups.group).astype(mx.float32)
    return (cells * scales[..., None] + biases[..., None]).reshape(codes.shape)


def packed(groups: Groups) -> tuple[mx.array, mx.array, mx.array]:
    """MLX's affine form: packed weight, scales and biases (float16 where that loses nothing)."""
    eights = groups.codes.reshape(*groups.codes.shape[:-1], -1, 8)
    words = np.zeros(eights.shape[:-1], dtype="<u8")
    for place in range(8):
        words |= eights[..., place].astype(np.uint64) << np.uint64(place * groups.bits)
    # eight codes fill exactly `bits` bytes: a little-endian stream of bits, which is MLX's layout
    stream = words.view(np.uint8).reshape(*words.shape, 8)[..., : groups.bits]
    weight = np.ascontiguousarray(stream).reshape(groups.codes.shape[0], -1).view("<u4")
    with np.errstate(over="ignore"):
        halves = [part.astype(np.float16) for part in (groups.scales, groups.biases)]
    exact = np.array_equal(halves[0], groups.scales) and np.array_equal(halves[1], groups.biases)
    scales, biases = halves if exact else (groups.scales, groups.biases)
    return mx.array(weight), mx.array(scales), mx.array(biases)


def _float(blocks: _Bytes, at: int) -> _Floats:
    half: NDArray[np.float16] = np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")
    return half.astype(np.float32)


def _nibbles(data: _Bytes) -> _Bytes:
    """[n, k, w] bytes to [n, k, 2w]: first all low halves, then all high halves."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


def _fifth_bits(blocks: _Bytes, at: int) -> _Bytes:
    return np.unpackbits(blocks[:, at : at + 4], axis=-1, bitorder="little") << 4


def _q4_0(blocks: _Bytes) -> _Decoded:
    scale = _float(blocks, 0)
    return _nibbles(blocks[:, 2:]), scale, -8 * scale


def _q4_1(blocks: _Bytes) -> _Decoded:
    return _nibbles(blocks[:, 4:]), _float(blocks, 0), _float(blocks, 2)


def _q5_0(blocks: _Bytes) -> _Decoded:
    scale = _float(blocks, 0)
    return _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2), scale, -16 * scale


def _q5_1(blocks: _Bytes) -> _Decoded:
    return _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4), _float(blocks, 0), _float(blocks, 2)


def _q8_0(blocks: _Bytes) -> _Decoded:
    scale = _float(blocks, 0)
    return blocks[:, 2:] ^ 0x80, scale, -128 * scale  # flipping the sign bit adds 128 to a signed byte


def _six_bit_pairs(data: _Bytes) -> tuple[_Floats, _Floats]:
    """The 8 scales and 8 minima of Q4_K and Q5_K, six bits each in 12 bytes."""
    low, middle, high = data[:, :4], data[:, 4:8], data[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=-1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q4_k(blocks: _Bytes) -> _Decoded:
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32))
    return codes, _float(blocks, 0) * scales, -_float(blocks, 2) * minima


def _q5_k(blocks: _Bytes) -> _Decoded:
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    codes = codes | ((blocks[:, None, 16:48] >> shifts & 1) << 4)
    return codes, _float(blocks, 0) * scales, -_float(blocks, 2) * minima


def _pairs(data: _Bytes) -> _Bytes:
    """[n, 2, 32] bytes to [n, 2, 4, 32] two-bit values, lowest pair first."""
    return data[:, :, None, :] >> _TWO_BITS[None, None, :, None] & 3


def _q6_k(blocks: _Bytes) -> _Decoded:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    codes = low | (_pairs(blocks[:, 128:192].reshape(-1, 2, 32)) << 4)
    scales = _float(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return codes, scales, -32 * scales


def _q2_k(blocks: _Bytes) -> _Decoded:
    codes = _pairs(blocks[:, 16:80].reshape(-1, 2, 32))
    scales = _float(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)
    return codes, scales, -_float(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32)


def _q3_k(blocks: _Bytes) -> _Decoded:
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    high = (blocks[:, None, :32] >> shifts & 1).reshape(-1, 2, 4, 32)
    codes = _pairs(blocks[:, 32:96].reshape(-1, 2, 32)) | (high << 2)
    upper = blocks[:, None, 104:108] >> _TWO_BITS[None, :, None] & 3
    six = _nibbles(blocks[:, 96:104]) | (upper.reshape(-1, 16) << 4)
    scales = _float(blocks, 108) * (six.astype(np.float32) - 32)
    return codes, scales, -4 * scales


BLOCKS: dict[int, Block] = {
    2: Block(32, 18, 4, _q4_0),
    3: Block(32, 20, 4, _q4_1),
    6: Block(32, 22, 5, _q5_0),
    7: Block(32, 24, 5, _q5_1),
    8: Block(32, 34, 8, _q8_0),
    10: Block(256, 84, 2, _q2_k),
    11: Block(256, 110, 3, _q3_k),
    12: Block(256, 144, 4, _q4_k),
    13: Block(256, 176, 5, _q5_k),
    14: Block(256, 210, 6, _q6_k),
}
