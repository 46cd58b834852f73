"""The files of an adapter folder, read: the configuration, and the tensors by layer.

PEFT's names are read as every way of saving writes them: with the adapter's name in them (a plain state
dict), and behind the prefixes of the wrappers for several devices and for compiling.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_adapters.adapter.from_mlx_lm import MLX_LM, as_peft_fields, is_mlx_lm
from mlx_adapters.errors import AdapterError, counted
from mlx_adapters.files.documents import read_object
from mlx_adapters.files.torch_bin import read_bin
from mlx_adapters.files.weights import header
from mlx_adapters.files.writing import refuse_links_out
from mlx_adapters.methods.base import AdapterLayer, Method
from mlx_adapters.models import sites

__all__ = [
    "BIN",
    "CONFIG",
    "MEMBERS",
    "META",
    "PREFIX",
    "SEEN",
    "WEIGHTS",
    "by_layer",
    "read_fields",
    "read_json",
    "read_tensors",
    "refuse_links",
    "sound",
    "weights_file",
]

CONFIG, WEIGHTS, META, SEEN = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "mlx_adapters.json",
    "seen.txt",
)
BIN = "adapter_model.bin"
"""What PEFT wrote before safetensors."""
MEMBERS = "members"
"""The folder below an adapter's that holds the adapters it is made of."""
PREFIX = "base_model.model."
_WRAPPERS = re.compile(
    r"^module\.|(?:^|(?<=\.))_(?:fsdp_wrapped_module|orig_mod|checkpoint_wrapped_module)\."
)
_LORA = re.compile(r"(^|\.)lora_\w+(\.|$)")
# What a file may hold of the base itself, beside the adapter.
_OF_BASE = {
    "base_layer.weight": "base.weight",
    "base_layer.bias": "base.bias",
    "original_module.weight": "base.weight",
    "original_module.bias": "base.bias",
    "weight": "base.weight",
    "bias": "base.bias",
}


def refuse_links(folder: Path) -> None:
    """AdapterError where a file of an adapter folder, in whatever format, lies outside it."""
    kinds = (".bin", ".json", ".safetensors")
    own = [file for file in folder.glob("*") if file.suffix in kinds]
    refuse_links_out(folder, [*own, *folder.rglob(SEEN), folder / MEMBERS], AdapterError)
    refuse_links_out(folder, (folder / MEMBERS).rglob("*"), AdapterError)


def read_fields(folder: Path) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter folder; of mlx-lm's, what PEFT's would say."""
    fields = read_json(folder / CONFIG, "so it is not an adapter folder")
    if "peft_type" in fields or not is_mlx_lm(folder):
        return fields
    names = {name for name in header(folder / MLX_LM) if name != "__metadata__"}
    return as_peft_fields(fields, folder / CONFIG, {name.rpartition(".")[0] for name in names})


def weights_file(folder: Path) -> Path:
    """The file with the tensors of an adapter folder: safetensors, or where there is none PEFT's `.bin`, or
    mlx-lm's."""
    if is_mlx_lm(folder):
        return folder / MLX_LM
    old = not (folder / WEIGHTS).exists() and (folder / BIN).exists()
    return folder / (BIN if old else WEIGHTS)


def read_tensors(folder: Path, name: str | None = None) -> dict[str, mx.array]:
    """The tensors of an adapter folder by their names, of the safetensors file `name` if it is given."""
    file = folder / name if name else weights_file(folder)
    if not file.exists():
        raise AdapterError(f"{folder}: has no {file.name}")
    if file.name == BIN:
        return sound(read_bin(file), file)
    try:
        header(file)  # MLX would make room for whatever size the header says
        arrays: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
        mx.eval(arrays)
    except Exception as error:
        raise AdapterError(
            f"{file}: cannot be read as safetensors ({error}). Was it copied completely?"
        ) from None
    return sound(arrays, file)


def sound(arrays: dict[str, mx.array], file: Path) -> dict[str, mx.array]:
    """`arrays` of a file; AdapterError where one of them is empty or holds NaN or infinity."""
    if empty := [name for name, array in arrays.items() if array.size == 0]:
        raise AdapterError(
            f"{file}: {len(empty)} of {len(arrays)} tensors are empty, e.g. {empty[0]}: it was saved under "
            "DeepSpeed ZeRO-3, which keeps the weights in parts. Gather them in PyTorch and save it again "
            "(stage3_gather_16bit_weights_on_model_save, or zero_to_fp32.py)"
        )
    floats = [name for name, array in arrays.items() if mx.issubdtype(array.dtype, mx.floating)]
    finite: Any = mx.stack([mx.isfinite(arrays[name]).all() for name in floats]).tolist() if floats else []
    if broken := [name for name, right in zip(floats, finite, strict=True) if not right]:
        raise AdapterError(
            f"{file}: {len(broken)} of {len(arrays)} tensors hold NaN or infinity, e.g. {broken[0]}: the run "
            "that saved it diverged, or the file is damaged"
        )
    return arrays


def by_layer(
    arrays: dict[str, mx.array], method: type[Method], model_type: str, folder: Path, *, plain: bool = False
) -> tuple[dict[str, dict[str, mx.array]], dict[str, mx.array]]:
    """({path: {attribute: array}}, {name of a shared tensor: array}) of the tensors of a folder.

    The path of a rooted layer is empty. What the file holds of the base itself has the attributes
    `base.weight` and `base.bias`. With `plain`, names are read as PEFT itself reads them. AdapterError for
    names the method does not have.
    """
    classes, in_peft = method.LAYERS, method.IN_PEFT
    grouped: dict[str, dict[str, mx.array]] = {}
    shared, strange = {}, []
    for key, array in arrays.items():
        name = _WRAPPERS.sub("", key)
        in_common = [one for layer in classes for one in layer.SHARED.values()]
        if (common := next((n for n in (name, name.rpartition(".")[0]) if n in in_common), None)) is not None:
            shared[common] = array.astype(mx.float32)
        elif (plain and name != key) or (found := _attribute(name, classes, in_peft, not plain)) is None:
            strange.append(key)
        else:
            path, attribute = found
            own = grouped.setdefault(sites.from_hf(path, model_type), {})
            if attribute in own and not (attribute == "bias" and _equal(own[attribute], array)):
                raise AdapterError(
                    f"{weights_file(folder)}: {key} is not the only tensor of its place: save one adapter "
                    "alone"
                )
            own[attribute] = array
    if strange or not grouped:
        what = f"{counted(len(strange), 'unexpected tensor')}, e.g. {strange[0]}" if strange else "no tensors"
        known = next(iter(classes[0].TENSORS.values()))
        raise AdapterError(
            f"{weights_file(folder)}: {what}. Expected names like "
            f"{known if classes[0].ROOTED else f'{PREFIX}...{known}'}"
        )
    return grouped, shared


def _equal(one: mx.array, other: mx.array) -> bool:
    """Whether two tensors of one place are the same: PEFT writes a bias of modules_to_save twice."""
    return one.shape == other.shape and bool(mx.array_equal(one, other))


def _attribute(
    key: str, classes: tuple[type[AdapterLayer], ...], in_peft: bool, named: bool
) -> tuple[str, str] | None:
    """(Hugging Face path, attribute) of a tensor's name; the longest suffix that fits counts."""
    suffixes: list[tuple[str, str]] = []
    for layer in classes:
        for attribute, suffix in [*layer.TENSORS.items(), *layer.ALIASES.items()]:
            if layer.ROOTED and key == suffix:
                return "", attribute
            suffixes += [] if layer.ROOTED else [(attribute, suffix)]
    if in_peft and suffixes:
        suffixes += [(attribute, suffix) for suffix, attribute in _OF_BASE.items()]
    fits = [
        (found[1], attribute)
        for attribute, suffix in suffixes
        if (found := _ending(suffix, in_peft and named).fullmatch(key)) and not _LORA.search(found[1])
    ]
    return min(fits, key=lambda fit: len(fit[0]), default=None)


@cache
def _ending(suffix: str, named: bool) -> re.Pattern[str]:
    """A name that ends with `suffix`; if `named`, with or without the adapter's: lora_A.default.weight."""
    stem, _, last = suffix.rpartition(".")
    end, between = re.escape(suffix), r"(?:\.[^.]+)?"
    if named and suffix in ("weight", "bias"):
        end = rf"(?:modules_to_save\.(?:[^.]+\.)?)?{suffix}"
    elif named and suffix not in _OF_BASE:
        end = rf"{re.escape(stem)}{between}\.{last}" if last in ("weight", "bias") else rf"{end}{between}"
    return re.compile(rf"{re.escape(PREFIX)}(.+?)\.{end}")


def read_json(file: Path, otherwise: str) -> dict[str, Any]:
    """The object in a JSON file of the folder; `otherwise` says what follows where there is no such file."""
    try:
        return read_object(file, AdapterError)
    except FileNotFoundError:
        raise AdapterError(f"{file.parent}: has no {file.name}, {otherwise}") from None
