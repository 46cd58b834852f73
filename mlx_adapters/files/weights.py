"""The weight files of a checkpoint: which ones they are, and whether they are whole."""

import struct
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_adapters.errors import CheckpointError
from mlx_adapters.files.documents import from_json

__all__ = ["INDEX", "bin_files", "header", "not_finite", "read_weights", "weight_files"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SINGLE_BIN, INDEX_BIN = "pytorch_model.bin", "pytorch_model.bin.index.json"
_WIDTHS = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}
_HEADER_LIMIT = 100_000_000  # the format's own limit; a broken file would make us read anything


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a folder's model is made of, each checked to be whole; [] without any.

    The rule is transformers': model.safetensors, else the shards that the index names, and no other file,
    whatever else lies in the folder. Every shard named must be there, and every tensor in the shard that is
    named for it. CheckpointError names the file that is missing, outside, truncated or broken.
    """
    if (folder / SINGLE).is_file():
        header(folder / SINGLE)
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        return _indexed(folder, folder / INDEX)
    strays = sorted(file.name for file in folder.glob("model*.safetensors"))
    if strays and not bin_files(folder):
        raise CheckpointError(
            f"{folder}: has {strays[0]}, but neither {SINGLE} nor {INDEX}, which says what the model is made "
            "of. Download that file too, or rename the one weight file"
        )
    return []


def bin_files(folder: Path) -> list[Path]:
    """The `.bin` files of a model, by the same rule; [] when there are none. They count where no safetensors
    files do."""
    if (folder / SINGLE_BIN).is_file():
        return [folder / SINGLE_BIN]
    index = folder / INDEX_BIN
    return _shards(folder, _weight_map(folder, index)) if index.exists() else []


def read_weights(folder: Path) -> dict[str, mx.array]:
    """The tensors of a folder's safetensors files, each read from disk when it is first used."""
    weights: dict[str, mx.array] = {}
    for file in weight_files(folder):
        try:
            arrays: Any = mx.load(str(file))
        except Exception as error:  # a header that is whole, in a type MLX does not know
            raise CheckpointError(f"{file}: cannot be read ({error})") from None
        weights |= arrays
    return weights


def not_finite(tensors: dict[str, mx.array]) -> tuple[str, str] | None:
    """(name, "NaN" or "infinity") of the first tensor that holds such a value. Empties `tensors`, so that no
    more than one of them need be in memory."""
    for name in list(tensors):
        array = tensors.pop(name)
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            return name, "NaN" if mx.isnan(array).any().item() else "infinity"
    return None


def header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, checked against the file's size; CheckpointError if they disagree."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 < length <= min(_HEADER_LIMIT, size - 8):
                raise CheckpointError(_truncated(file, f"it has {size} bytes, its header wants {length}"))
            fields = from_json(stream.read(length))
            if not isinstance(fields, dict):
                raise ValueError("not an object")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise CheckpointError(f"{file}: is not a safetensors file (its header is not JSON)") from None
    tensors = {name: entry for name, entry in fields.items() if name != "__metadata__"}
    for name, entry in tensors.items():
        _check_entry(file, name, entry)
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if 8 + length + end != size:
        raise CheckpointError(_truncated(file, f"it has {size} bytes, its header says {8 + length + end}"))
    return tensors


def _check_entry(file: Path, name: str, entry: Any) -> None:
    try:
        begin, end = entry["data_offsets"]
        count = 1
        for extent in entry["shape"]:
            count *= extent
        width = _WIDTHS.get(entry["dtype"])
        sound = 0 <= begin <= end and (width is None or end - begin == count * width)
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"{file}: tensor '{name}' has a shape that does not fit its bytes; download it again"
        )


def _shards(folder: Path, mapping: dict[str, str]) -> list[Path]:
    return [folder / shard for shard in sorted(set(mapping.values()))]


def _weight_map(folder: Path, index: Path) -> dict[str, str]:
    try:
        mapping: dict[str, str] = from_json(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(mapping.values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise CheckpointError(
            f"{index}: is not an index of shards (no readable field 'weight_map')"
        ) from None
    outside = [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]
    if outside:
        raise CheckpointError(f"{index}: names {outside[0]!r}, which lies outside the folder; refused")
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder}: {len(absent)} of {len(shards)} shards are missing ({', '.join(absent[:4])}); "
            "download them"
        )
    return mapping


def _indexed(folder: Path, index: Path) -> list[Path]:
    mapping = _weight_map(folder, index)
    shards = _shards(folder, mapping)
    headers = {shard.name: header(shard) for shard in shards}
    lost = [name for name, shard in mapping.items() if name not in headers[shard]]
    if lost:
        raise CheckpointError(f"{index}: says '{lost[0]}' is in {mapping[lost[0]]}, which does not have it")
    return shards


def _truncated(file: Path, detail: str) -> str:
    return f"{file}: is truncated or damaged ({detail}); download it again"
