"""The quantized blocks of GGUF as (codes, scales, biases): value = code * scale + bias, exactly.

Most block types are affine in small groups, as MLX's own quantization is. Where the groups have 32 values the
codes go into MLX's packing without loss; groups of 16 (Q2_K, Q3_K, Q6_K) MLX does not have. The 16 values of
IQ4_NL and IQ4_XS are bytes, and are packed as such; MXFP4 is MLX's own mode of that name. The types whose
values come from large tables (IQ1, IQ2, IQ3, TQ) are left to the package gguf, which gives float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BLOCKS",
    "FROM_PACKAGE",
    "MLX_GROUP",
    "Block",
    "Groups",
    "dense",
    "dequantized",
    "has_form",
    "packed",
]

MLX_GROUP = 32
_Bytes = NDArray[Any]  # uint8 throughout; numpy's stubs take `bytes & 15` for a signed array
_Floats = NDArray[np.float32]
_Decoded = tuple[_Bytes, _Floats, _Floats]
_TWO_BITS = np.array([0, 2, 4, 6], dtype=np.uint8)
# what a code of IQ4 stands for; Kawrakow 2024, ggml-common.h
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# what a code of four bits stands for in floating point with two bits of exponent; OCP MX 1.0, table 5
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])
_EXPONENT = 127  # what the exponent of a block's scale is counted from


@dataclass(frozen=True)
class Groups:
    """A matrix as codes [..., rows, columns] with scales and biases [..., rows, columns / group] in float32.

    In the mode "mxfp4" the codes are floating-point numbers of four bits, and there are no biases.
    """

    codes: _Bytes
    scales: _Floats
    biases: _Floats
    bits: int
    mode: str = "affine"

    @property
    def group(self) -> int:
        """How many values share one scale."""
        return int(self.codes.shape[-1] // self.scales.shape[-1])

    def rows(self, order: NDArray[np.int64] | slice) -> "Groups":
        """The same matrix with its rows in another order."""
        return self._each(lambda part: part[..., order, :])

    def columns(self, order: NDArray[np.int64]) -> "Groups | None":
        """The same matrix with its columns in another order; None where that takes groups apart."""
        blocks = order.reshape(-1, self.group) if len(order) % self.group == 0 else order[None, :0]
        whole = blocks - np.arange(self.group) if blocks.size else blocks
        if not whole.size or (whole != whole[:, :1]).any() or (whole % self.group).any():
            return None
        places = whole[:, 0] // self.group
        return replace(
            self,
            codes=self.codes[..., order],
            scales=self.scales[..., places],
            biases=self.biases[..., places],
        )

    def reshaped(self, shape: tuple[int, ...]) -> "Groups":
        """The same values as a stack of matrices, whose columns stay."""
        return self._each(lambda part: part.reshape(*shape[:-1], -1))

    def like(self, other: "Groups") -> bool:
        """Whether both have the same codes, so that their rows can be joined."""
        return (self.bits, self.mode, self.group) == (other.bits, other.mode, other.group)

    @staticmethod
    def joined(parts: "Sequence[Groups]") -> "Groups":
        """The rows of several matrices one after the other."""
        codes, scales, biases = (
            np.concatenate([getattr(part, name) for part in parts], axis=-2)
            for name in ("codes", "scales", "biases")
        )
        return replace(parts[0], codes=codes, scales=scales, biases=biases)

    def _each(self, change: Callable[[Any], Any]) -> "Groups":
        return replace(self, codes=change(self.codes), scales=change(self.scales), biases=change(self.biases))


@dataclass(frozen=True)
class Block:
    """A block type: how many values in how many bytes, and how to read blocks [n, width]."""

    values: int
    width: int
    bits: int
    decode: Callable[[_Bytes], _Decoded]
    mode: str = "affine"

    def groups(self, data: _Bytes, rows: int) -> Groups:
        """Read a whole matrix of `rows` rows."""
        codes, scales, biases = self.decode(data.reshape(-1, self.width))
        shape = (rows, -1)
        return Groups(
            codes.reshape(shape), scales.reshape(shape), biases.reshape(shape), self.bits, self.mode
        )


def has_form(groups: Groups) -> bool:
    """Whether MLX holds these groups without loss."""
    if groups.mode == "mxfp4":  # its exponents 0 and 255 stand for other numbers in MLX
        return bool((groups.scales >= 2.0**-126).all() and (groups.scales <= 2.0**126).all())
    return groups.group == MLX_GROUP


def dense(groups: Groups) -> mx.array:
    """The values in float32, computed when MLX needs them: until then only the codes take memory."""
    if has_form(groups):
        parts = packed(groups)
        scales, biases = parts["scales"], parts.get("biases")
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(
            parts["weight"],
            scales,
            biases,
            group_size=groups.group,
            bits=groups.bits,
            mode=groups.mode,
            dtype=mx.float32,
        )
    codes, scales, biases = (mx.array(part) for part in (groups.codes, groups.scales, groups.biases))
    cells = codes.reshape(*scales.shape, groups.group)
    if groups.mode == "mxfp4":
        return (mx.array(_E2M1)[cells] * scales[..., None]).reshape(codes.shape)
    return (cells.astype(mx.float32) * scales[..., None] + biases[..., None]).reshape(codes.shape)


def packed(groups: Groups) -> dict[str, mx.array]:
    """MLX's own form: packed weight, scales and, where it is affine, biases (float16 where that loses
    nothing)."""
    eights = groups.codes.reshape(*groups.codes.shape[:-1], -1, 8)
    words = np.zeros(eights.shape[:-1], dtype="<u8")
    for place in range(8):
        words |= eights[..., place].astype(np.uint64) << np.uint64(place * groups.bits)
    # eight codes fill exactly `bits` bytes: a little-endian stream of bits, which is MLX's layout
    stream = words.view(np.uint8).reshape(*words.shape, 8)[..., : groups.bits]
    weight = np.ascontiguousarray(stream).reshape(*groups.codes.shape[:-1], -1).view("<u4")
    if groups.mode == "mxfp4":
        exponents = np.frexp(groups.scales)[1] - 1 + _EXPONENT
        return {"weight": mx.array(weight), "scales": mx.array(exponents.astype(np.uint8))}
    with np.errstate(over="ignore"):
        halves = [part.astype(np.float16) for part in (groups.scales, groups.biases)]
    exact = np.array_equal(halves[0], groups.scales) and np.array_equal(halves[1], groups.biases)
    scales, biases = halves if exact else (groups.scales, groups.biases)
    return {"weight": mx.array(weight), "scales": mx.array(scales), "biases": mx.array(biases)}


def dequantized(raw: _Bytes, kind: int, shape: tuple[int, ...]) -> mx.array | None:
    """The values of one of `FROM_PACKAGE` in float32; None where the package gguf is not installed."""
    try:
        import gguf
    except ImportError:
        return None
    rows = raw.reshape(int(np.prod(shape[:-1], dtype=np.int64)), -1)
    return mx.array(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(kind)).reshape(shape))


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


def _iq4(codes: _Bytes, scale: _Floats) -> _Decoded:
    return (np.array(_IQ4) + 128).astype(np.uint8)[codes], scale, -128 * scale


def _iq4_nl(blocks: _Bytes) -> _Decoded:
    return _iq4(_nibbles(blocks[:, 2:]), _float(blocks, 0))


def _iq4_xs(blocks: _Bytes) -> _Decoded:
    low = blocks[:, 4:8, None] >> np.array([0, 4], dtype=np.uint8) & 15
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    six = low.reshape(-1, 8) | (high.astype(np.uint8) << 4)
    scale = _float(blocks, 0) * (six.astype(np.float32) - 32)
    return _iq4(_nibbles(blocks[:, 8:].reshape(-1, 8, 16)), scale)


def _mxfp4(blocks: _Bytes) -> _Decoded:
    scale = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - _EXPONENT)
    return _nibbles(blocks[:, 1:]), scale, np.zeros_like(scale)


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
    20: Block(32, 18, 8, _iq4_nl),
    23: Block(256, 136, 8, _iq4_xs),
    39: Block(32, 17, 4, _mxfp4, "mxfp4"),
}
FROM_PACKAGE = {16: 66, 17: 74, 18: 98, 19: 50, 21: 110, 22: 82, 29: 56, 34: 54, 35: 66}
"""IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S, IQ3_S, IQ2_S, IQ1_M, TQ1_0, TQ2_0: type -> bytes of 256 values."""
