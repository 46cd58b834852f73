"""The container of GGUF: metadata and where each tensor lies, every count checked against the file's size."""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_adapters.convert.gguf_blocks import BLOCKS, FROM_PACKAGE
from mlx_adapters.errors import CheckpointError, UnsupportedError

__all__ = ["PLAIN", "Container", "Tensor", "read_container"]

PLAIN = {0: 4, 1: 2, 30: 2}  # F32, F16, BF16: type -> bytes of a value
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_PART = re.compile(r"(.*)-(?:\d{5})-of-(\d{5})\.gguf")
_NAMES = {9: "Q8_1", 15: "Q8_K", 40: "NVFP4"}


@dataclass(frozen=True)
class Tensor:
    """A tensor's place. `shape` is in the order of numpy (rows first), the reverse of the file's."""

    name: str
    shape: tuple[int, ...]
    kind: int
    begin: int
    size: int
    data: NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True)
class Container:
    """A GGUF file, or the parts of one: its metadata, and its tensors (mapped, read on use)."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    def bytes_of(self, tensor: Tensor) -> NDArray[np.uint8]:
        """The raw bytes of a tensor."""
        return tensor.data[tensor.begin : tensor.begin + tensor.size]


class _Cursor:
    """Reads forward and refuses to leave the file."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path, self.view, self.at = path, memoryview(data.data), 0

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: is truncated or damaged ({' '.join(what.split())}); download it again"
        )

    def take(self, count: int, what: str) -> memoryview:
        if count > len(self.view) - self.at:
            raise self.damaged(f"{what} wants {count} bytes at {self.at}, the file has {len(self.view)}")
        self.at += count
        return self.view[self.at - count : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def count(self, smallest: int, what: str) -> int:
        """A count of things that take at least `smallest` bytes each, so a lie cannot reserve memory."""
        value = int(self.number("<Q", what))
        if value * smallest > len(self.view) - self.at:
            raise self.damaged(f"{what} is {value}, more than the file can hold")
        return value

    def text(self, what: str) -> str:
        try:
            return str(self.take(self.count(1, f"length of {what}"), what), "utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8") from None

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY or depth > 3:
            raise self.damaged(f"{what} has type {kind}, which does not exist")
        inner = self.number("<I", what)
        if inner in _SCALARS:
            code = _SCALARS[inner]
            width = struct.calcsize(code)
            count = self.count(width, f"length of {what}")
            return list(struct.unpack(f"<{count}{code[1]}", self.take(count * width, what)))
        return [
            self.value(inner, what, depth + 1) for _ in range(self.count(8 if inner == _STRING else 12, what))
        ]


def read_container(path: Path) -> Container:
    """Read the header of a GGUF file, and of the parts beside it where it is one of several; CheckpointError
    when it is not one, truncated or inconsistent, or a part is missing."""
    found = _read(path)
    count = found.fields.get("split.count", 0)
    if not isinstance(count, int) or count < 2:
        return found
    name = _PART.fullmatch(path.name)
    if name is None or int(name[2]) != count:
        raise CheckpointError(
            f"{path}: is one of {count} parts, which are found by their names: it should end with "
            f"-00001-of-{count:05}.gguf"
        )
    parts = []
    for number in range(1, count + 1):
        part = path.with_name(f"{name[1]}-{number:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise CheckpointError(f"{part}: no such file; it is part {number} of {count} of {path.name}")
        parts.append(_read(part))
    tensors: dict[str, Tensor] = {}
    for one in parts:
        if twice := tensors.keys() & one.tensors.keys():
            raise CheckpointError(f"{one.path}: tensor '{min(twice)}' is in another part too")
        tensors |= one.tensors
    return Container(path, parts[0].fields, tensors)


def _read(path: Path) -> Container:
    try:
        if path.stat().st_size < 24:
            raise CheckpointError(f"{path}: is not a GGUF file (it has {path.stat().st_size} bytes)")
        data: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    cursor = _Cursor(path, data)
    if bytes(cursor.take(4, "magic")) != b"GGUF":
        raise CheckpointError(f"{path}: is not a GGUF file (it starts with other bytes)")
    version = cursor.number("<I", "version")
    if version not in (2, 3):
        raise UnsupportedError(
            f"{path}: is GGUF version {version} or big-endian; versions 2 and 3, little-endian, are read"
        )
    count = cursor.count(24, "number of tensors")
    fields = dict(_fields(cursor))
    entries = [_entry(cursor) for _ in range(count)]
    return Container(path, fields, _place(cursor, fields, entries, data))


def _fields(cursor: _Cursor) -> Iterator[tuple[str, Any]]:
    for _ in range(cursor.count(13, "number of metadata fields")):
        name = cursor.text("metadata name")
        yield name, cursor.value(cursor.number("<I", name), name)


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text("tensor name")
    rank = cursor.number("<I", name)
    if not 1 <= rank <= 4:
        raise cursor.damaged(f"tensor '{name}' has {rank} dimensions")
    shape = tuple(int(cursor.number("<Q", name)) for _ in range(rank))[::-1]
    if min(shape) < 1:
        raise cursor.damaged(f"tensor '{name}' has shape {list(shape)}")
    return name, shape, int(cursor.number("<I", name)), int(cursor.number("<Q", name))


def _place(
    cursor: _Cursor,
    fields: dict[str, Any],
    entries: list[tuple[str, tuple[int, ...], int, int]],
    data: NDArray[np.uint8],
) -> dict[str, Tensor]:
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {alignment}, not a power of two")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in entries:
        size = _bytes(cursor, name, shape, kind)
        if name in tensors:
            raise cursor.damaged(f"tensor '{name}' is there twice")
        if offset % alignment or start + offset + size > len(cursor.view):
            raise cursor.damaged(
                f"tensor '{name}' wants {size} bytes at {start + offset}, the file has {len(cursor.view)}"
            )
        tensors[name] = Tensor(name, shape, kind, start + offset, size, data)
    return tensors


def _bytes(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int) -> int:
    count = 1
    for extent in shape:
        count *= extent
    if kind in PLAIN:
        return count * PLAIN[kind]
    if kind in BLOCKS:
        values, width = BLOCKS[kind].values, BLOCKS[kind].width
    elif kind in FROM_PACKAGE:
        values, width = 256, FROM_PACKAGE[kind]
    else:
        raise UnsupportedError(
            f"{cursor.path}: tensor '{name}' has type {_NAMES.get(kind, kind)}, which is not read. "
            "Use a file in F16, BF16, Q8_0, Q4_0 to Q5_1, Q2_K to Q6_K, IQ4 or MXFP4"
        )
    if shape[-1] % values:
        raise cursor.damaged(f"tensor '{name}' has rows of {shape[-1]}, no multiple of {values}")
    return count // values * width
