"""Write PyTorch's `.bin` files without torch: a zip archive with a pickle and one file per tensor.

The pickle names nothing but torch's own storage type and tensor builder, so `torch.load(weights_only=True)`
reads it.
"""

import struct
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_adapters.errors import writing_to

__all__ = ["write_bin"]

_STORAGES = {mx.float32: ("FloatStorage", "<f4"), mx.float16: ("HalfStorage", "<f2")}


def write_bin(file: Path, tensors: dict[str, mx.array]) -> None:
    """Write named tensors; float16 stays, everything else becomes float32."""
    with writing_to(file), zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        writable = {n: a if a.dtype in _STORAGES else a.astype(mx.float32) for n, a in tensors.items()}
        archive.writestr(_entry("data.pkl"), _pickle(writable))
        archive.writestr(_entry("byteorder"), "little")
        for number, array in enumerate(writable.values()):
            data = np.array(array).astype(_STORAGES[array.dtype][1]).tobytes()
            archive.writestr(_entry(f"data/{number}"), data)
        archive.writestr(_entry("version"), "3\n")


def _entry(name: str) -> zipfile.ZipInfo:
    # without the time of day: the same tensors make the same file
    return zipfile.ZipInfo(f"archive/{name}")


def _pickle(tensors: dict[str, mx.array]) -> bytes:
    """OrderedDict of name -> _rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())."""
    out = bytearray(b"\x80\x02" + _EMPTY + b"(")
    for number, (name, array) in enumerate(tensors.items()):
        kind = f"ctorch\n{_STORAGES[array.dtype][0]}\n".encode()
        storage = (
            b"(" + _text("storage") + kind + _text(str(number)) + _text("cpu") + _int(array.size) + b"tQ"
        )
        strides = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
        out += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n("
        out += storage + _int(0) + _tuple(list(array.shape)) + _tuple(strides) + b"\x89" + _EMPTY + b"tR"
    return bytes(out + b"u.")


_EMPTY = b"ccollections\nOrderedDict\n)R"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _tuple(values: list[int]) -> bytes:
    return b"(" + b"".join(_int(value) for value in values) + b"t"
