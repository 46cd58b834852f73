"""Read PyTorch's `.bin` checkpoints without torch and without running what the pickle asks for.

A pickle may name any function to call. This reader knows OrderedDict, two functions of torch and its storage
types, puts its own harmless ones in the place of torch's, and refuses every other name before a call.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_adapters.errors import CheckpointError, UnsupportedError, first_line

__all__ = ["read_bin"]

_BFLOAT = "bfloat16"
_STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": _BFLOAT,
    "ByteStorage": "u1",
    "CharStorage": "i1",
    "ShortStorage": "<i2",
    "IntStorage": "<i4",
    "LongStorage": "<i8",
    "BoolStorage": "?",
}
_SHARED = 4  # how often a file's bytes may be read by different tensors; more is an attack on the memory


def read_bin(path: Path) -> dict[str, mx.array]:
    """The tensors of a `.bin` file by name (float64 becomes float32, which is what MLX has).

    Raises CheckpointError for a file that is truncated, asks for code, or does not hold named tensors, and
    UnsupportedError for files older than PyTorch 1.6 and for big-endian ones.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            found = _Reader(path, archive).read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError):  # or a kind zipfile cannot read
        raise _no_archive(path) from None
    return found


def _no_archive(path: Path) -> CheckpointError | UnsupportedError:
    with path.open("rb") as stream:
        start = stream.read(2)
    if start == b"\x80\x02":  # a bare pickle
        return UnsupportedError(
            f"{path}: was written by PyTorch before 1.6, which is not read. Save it again with a newer one"
        )
    return CheckpointError(f"{path}: is truncated or no PyTorch checkpoint; download it again")


class _Sealed:
    """Objects a pickle may hold but not change: its BUILD instruction would otherwise set their fields."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes an object it should only hold")


@dataclass(frozen=True)
class _Kind(_Sealed):
    name: str


@dataclass(frozen=True)
class _Storage(_Sealed):
    key: str
    kind: str
    data: NDArray[Any]


@dataclass(frozen=True)
class _Tensor(_Sealed):
    place: tuple[Any, ...]
    kind: str
    data: NDArray[Any]


class _Call(_Sealed):
    """A function of ours under a name of torch's."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, storage: Callable[[_Kind, str, int], _Storage]) -> None:
        super().__init__(stream)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _Kind(_STORAGES[name])
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
            ("torch._utils", "_rebuild_parameter"): _Call(_parameter),
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}"[:120])
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if (
            not isinstance(pid, tuple)
            or len(pid) != 5
            or not isinstance(pid[1], _Kind)
            or not isinstance(pid[2], str)
            or not isinstance(pid[4], int)
        ):
            raise pickle.UnpicklingError("it describes its storage in an unknown way")
        return self._storage(pid[1], pid[2], pid[4])


class _Reader:
    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self.entries = {entry.filename: entry for entry in archive.infolist()}
        self.size = path.stat().st_size
        self.storages: dict[str, _Storage] = {}

    def read(self) -> dict[str, mx.array]:
        roots = [name[: -len("data.pkl")] for name in self.entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise CheckpointError(f"{self.path}: holds no data.pkl, so it is not a PyTorch checkpoint")
        self.root = roots[0]
        if f"{self.root}byteorder" in self.entries and self.bytes("byteorder") != b"little":
            raise UnsupportedError(f"{self.path}: was written big-endian, which is not read")
        try:
            with self.archive.open(self.entry("data.pkl")) as stream:
                state = _Unpickler(stream, self.storage).load()
        except (CheckpointError, OSError, zipfile.BadZipFile):
            raise
        except Exception as error:  # a broken pickle raises almost anything
            reason = first_line(error)
            raise CheckpointError(
                f"{self.path}: refused, {reason[:160]}. Ask for a safetensors file instead"
            ) from None
        return self.arrays(state)

    def arrays(self, state: Any) -> dict[str, mx.array]:
        if not isinstance(state, dict) or not state:
            raise CheckpointError(f"{self.path}: holds no tensors by name; a state dict is needed")
        made: dict[tuple[Any, ...], mx.array] = {}
        found: dict[str, mx.array] = {}
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                raise CheckpointError(
                    f"{self.path}: entry {str(name)[:60]!r} is not a tensor; a plain state dict is needed"
                )
            if tensor.place not in made:
                made[tensor.place] = self.array(tensor)
                if sum(array.nbytes for array in made.values()) > _SHARED * self.size:
                    raise CheckpointError(f"{self.path}: refused, its tensors are far larger than the file")
            found[name] = made[tensor.place]
        return found

    def array(self, tensor: _Tensor) -> mx.array:
        data = mx.array(np.ascontiguousarray(tensor.data).reshape(tensor.data.shape))
        return data.view(mx.bfloat16) if tensor.kind == _BFLOAT else data

    def entry(self, name: str) -> zipfile.ZipInfo:
        entry = self.entries.get(self.root + name)
        if entry is None:
            raise CheckpointError(f"{self.path}: is damaged, its part '{name[:60]}' is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > self.size:
            raise CheckpointError(f"{self.path}: refused, its part '{name[:60]}' is compressed")
        return entry

    def bytes(self, name: str) -> bytes:
        return self.archive.read(self.entry(name))

    def storage(self, kind: _Kind, key: str, count: int) -> _Storage:
        if key not in self.storages:
            dtype = np.dtype("<u2" if kind.name == _BFLOAT else kind.name)
            raw = self.bytes(f"data/{key}")
            if count * dtype.itemsize != len(raw):
                raise CheckpointError(
                    f"{self.path}: is damaged, part 'data/{key}' has {len(raw)} bytes, "
                    f"not {count * dtype.itemsize}; download it again"
                )
            self.storages[key] = _Storage(key, kind.name, np.frombuffer(raw, dtype))
        if self.storages[key].kind != kind.name:
            raise pickle.UnpicklingError(f"it reads storage {key} as two types")
        return self.storages[key]


def _whole(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    sound = isinstance(storage, _Storage) and _whole((offset,)) and _whole(shape) and _whole(strides)
    if not sound or len(shape) != len(strides):
        raise pickle.UnpicklingError("it describes a tensor in an unknown way")
    size, count = storage.data.size, 1
    for extent in shape:
        count *= extent
    last = sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
    if count > size or (count and offset + last >= size):
        raise pickle.UnpicklingError(f"a tensor of shape {list(shape)} reaches outside its storage")
    width = storage.data.itemsize
    view = np.lib.stride_tricks.as_strided(
        storage.data[offset:] if count else storage.data[:0],
        shape,
        [stride * width for stride in strides],
        writeable=False,
    )
    return _Tensor((storage.key, offset, shape, strides), storage.kind, view)


def _parameter(tensor: Any, *_: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise pickle.UnpicklingError("it makes a parameter of something that is not a tensor")
    return tensor
