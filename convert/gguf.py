"""Read a GGUF file: config, weights under the names of MLX's modules, tokenizer.

Quantized tensors keep their exact values: in MLX's own groups where MLX has such groups, else as float32.
Tensors are read from the mapped file one at a time.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_adapters.convert.gguf_blocks import (
    BLOCKS,
    FROM_PACKAGE,
    MLX_GROUP,
    Groups,
    dense,
    dequantized,
    has_form,
    packed,
)
from mlx_adapters.convert.gguf_changes import Matrix, joined, shared_out
from mlx_adapters.convert.gguf_families import FAMILIES, LAYER, TOP, Family, family_of
from mlx_adapters.convert.gguf_file import Container, Tensor, read_container
from mlx_adapters.convert.gguf_metadata import ROPE_FACTORS, Metadata, common
from mlx_adapters.errors import AdaptersError, CheckpointError, UnsupportedError, one_line, unknown
from mlx_adapters.models import config as model_config

__all__ = ["GGUF", "family_in", "place", "read_gguf"]

_USUAL = {"group_size": MLX_GROUP, "mode": "affine"}


@dataclass(frozen=True, kw_only=True)
class GGUF:
    """What a GGUF file holds. `quantization` is MLX's section of config.json, or None for plain weights."""

    config: dict[str, Any]
    weights: dict[str, mx.array]
    quantization: dict[str, Any] | None
    fields: dict[str, Any] = field(repr=False)
    path: Path

    def write_tokenizer(self, dst: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json to the folder `dst`."""
        from mlx_adapters.convert.gguf_tokenizer import write

        write(self.fields, dst, source=self.path)


def read_gguf(path: Path, *, keep_quantized: bool) -> GGUF:
    """Read `path`; with `keep_quantized`, quantized matrices become MLX's packed groups without loss.

    Raises CheckpointError for a file that is truncated or inconsistent, and UnsupportedError for an
    architecture, a tensor type or a rope scaling that is not read.
    """
    container = read_container(Path(path))
    family, found = family_in(container)
    config = {"architectures": [family.model_class], "model_type": family.model_type} | common(found)
    config |= family.fields(found, config)
    packable = _packable(container.path, config)
    weights: dict[str, mx.array] = {}
    modes: dict[str, dict[str, Any]] = {}
    for name, matrix in _matrices(container, family, config):
        module = name.removesuffix(".weight")
        if keep_quantized and isinstance(matrix, Groups) and module in packable and has_form(matrix):
            weights |= {f"{module}.{part}": array for part, array in packed(matrix).items()}
            modes[module] = _USUAL | {"bits": matrix.bits, "mode": matrix.mode}
        else:
            weights[name] = dense(matrix) if isinstance(matrix, Groups) else matrix
    return GGUF(
        config=config,
        weights=weights,
        quantization=_quantization(modes),
        fields=container.fields,
        path=container.path,
    )


def family_in(container: Container) -> tuple[Family, Metadata]:
    """How a file is read, and its metadata; UnsupportedError where it is not."""
    arch = container.fields.get("general.architecture")
    if not isinstance(arch, str) or arch not in FAMILIES:
        raise UnsupportedError(f"{container.path}: {unknown('architecture', str(arch)[:60], FAMILIES)}")
    found = Metadata(container, arch)
    return family_of(arch, found), found


# Tensors ---------------------------------------------------------------------------------------------------


def _matrices(container: Container, family: Family, config: dict[str, Any]) -> Iterator[tuple[str, Matrix]]:
    """Every parameter of the model with its values, in the file's order but for those that are joined."""
    waiting: dict[str, dict[int, Matrix]] = {}
    for tensor in container.tensors.values():
        targets = place(container.path, tensor.name, family, config["num_hidden_layers"])
        if not targets:
            continue
        parts = _changed(container, tensor, len(targets), family, config)
        for target, part in zip(targets, parts, strict=True):
            name, bracket, rest = target.partition("[")
            if not bracket:
                yield name, part
                continue
            index, ending = rest.split("]")
            pieces = waiting.setdefault(f"{name}{ending}", {})
            pieces[int(index)] = part
            if len(pieces) == 2:
                whole = _joined(container.path, name, waiting.pop(f"{name}{ending}"), family, config)
                yield f"{name}{ending}", whole
    for name in waiting:
        raise CheckpointError(f"{container.path}: has only a half of {name}; download it again")


def _joined(
    path: Path, module: str, pieces: dict[int, Matrix], family: Family, config: dict[str, Any]
) -> Matrix:
    change = next((c for name, c in family.joined.items() if module.endswith(name)), None)
    try:
        whole = joined([pieces[index] for index in sorted(pieces)])
        return change(whole, config) if change else whole
    except ValueError as error:
        raise CheckpointError(f"{path}: the halves of {module} do not fit ({one_line(error)})") from None


def _changed(
    container: Container, tensor: Tensor, parts: int, family: Family, config: dict[str, Any]
) -> list[Matrix]:
    matrix = _values(container, tensor)
    change = family.changes.get(_part(tensor.name))
    try:
        matrix = change(matrix, config) if change else matrix
        return shared_out(matrix, parts) if parts > 1 else [matrix]
    except ValueError as error:
        raise CheckpointError(
            f"{container.path}: tensor '{tensor.name}' {one_line(error)}; download it again"
        ) from None


def _part(name: str) -> str:
    """`attn_q` of blk.3.attn_q.weight."""
    rest = name.split(".", 2)[-1] if name.startswith("blk.") else name
    base, dot, _ = rest.rpartition(".")
    return base if dot else rest


def place(path: Path, name: str, family: Family, layers: int) -> tuple[str, ...]:
    """The parameters of MLX's model that the tensor `name` holds; none for what is not part of the model.

    UnsupportedError for a tensor that the family does not have.
    """
    if name in ROPE_FACTORS:
        return ()
    prefix, rest = family.prefix, name
    modules: dict[str, Any] = TOP | dict(family.top)
    block = name.split(".")[1] if name.startswith("blk.") else ""
    if block.isdecimal():
        if int(block) >= layers:
            return ()  # predicts further tokens
        rest, modules = name.split(".", 2)[-1], LAYER | dict(family.layer)
        prefix = f"{prefix}model.layers.{int(block)}."
    found = modules.get(rest)
    ending = ""
    if found is None:
        base, _, ending = rest.rpartition(".")
        found = modules.get(base) if ending in ("weight", "bias") else None
        ending = f".{ending}"
    if found is None:
        raise UnsupportedError(
            f"{path}: tensor {name[:80]!r} belongs to no {family.model_type} model that is read from GGUF"
        )
    return tuple(f"{prefix}{one}{ending}" for one in ((found,) if isinstance(found, str) else found))


def _values(container: Container, tensor: Tensor) -> Matrix:
    raw = container.bytes_of(tensor)
    if tensor.kind in BLOCKS:
        rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        return BLOCKS[tensor.kind].groups(raw, rows).reshaped(tensor.shape)
    if tensor.kind in FROM_PACKAGE:
        found = dequantized(raw, tensor.kind, tensor.shape)
        if found is None:
            raise UnsupportedError(
                f"{container.path}: tensor '{tensor.name}' has a type that only the package gguf reads: "
                'pip install "mlx-adapters[gguf]"'
            )
        return found
    if tensor.kind == 30:  # numpy has no bfloat16
        return mx.array(raw.view("<u2").reshape(tensor.shape)).view(mx.bfloat16)
    return mx.array(raw.view("<f4" if tensor.kind == 0 else "<f2").reshape(tensor.shape))


# Groups ----------------------------------------------------------------------------------------------------


def _packable(path: Path, config: dict[str, Any]) -> set[str]:
    """The modules of the model that MLX can hold in groups."""
    try:
        config = model_config.normalise(config)
        model_class, args = model_config.classes(config)
        model = model_class(args.from_dict(config))
    except AdaptersError as error:  # speaks of config.json, whose fields the metadata are
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:  # sizes that a model file stumbles over
        raise CheckpointError(f"{path}: its metadata describe no model ({one_line(error)})") from None
    return {name for name, module in model.named_modules() if hasattr(module, "to_quantized")}


def _quantization(modes: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    if not modes:
        return None
    usual = Counter(tuple(sorted(mode.items())) for mode in modes.values()).most_common(1)[0][0]
    section = dict(usual)
    return section | {name: mode for name, mode in modes.items() if mode != section}
