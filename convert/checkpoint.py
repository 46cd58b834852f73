"""Convert a checkpoint (hub id, folder, or .gguf file) to an MLX model folder, quantized if asked.

Reading never runs code from the checkpoint: safetensors and GGUF hold no code, `.bin` files go through an
allow-list, and custom model files are refused. The quantization is mlx-lm's.
"""

import contextlib
import io
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_adapters.errors import CheckpointError, ConfigError, UnsupportedError, one_line
from mlx_adapters.files import writing
from mlx_adapters.files.weights import SINGLE, SINGLE_BIN, bin_files, not_finite, read_weights, weight_files
from mlx_adapters.models import config as model_config
from mlx_adapters.models import fields, names, unread
from mlx_adapters.models import load as models
from mlx_adapters.models import stop_tokens as ends
from mlx_adapters.models.build import build, cast
from mlx_adapters.models.origin import remember, remembered
from mlx_adapters.units import duration, size

__all__ = [
    "MODES",
    "RECIPES",
    "Converted",
    "check_options",
    "convert",
    "copy_tokenizer",
    "refuse_links",
    "refuse_not_finite",
    "write_ends",
    "write_mlx",
]

RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
# What MLX's kernels exist for: mode -> (bits, group sizes)
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
)
_KINDS = ("tokenizer.json", "tokenizer.model", "vocab.json", "ice_text.model")
_BIN = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion wrote. `parameters` counts weights, however many bits each has; `remark` says of a
    model_type that it was not compared with transformers, and which tensors are not used."""

    path: Path
    bytes: int
    bits_per_weight: float
    parameters: int
    seconds: float
    dtype: str
    remark: str | None = None

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.parameters / 1e6:.1f} M parameters, {size(self.bytes)}, "
            f"{self.bits_per_weight:.2f} bits per weight ({self.dtype}), {duration(self.seconds)}"
        )


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A checkpoint in memory (weights not yet read from disk where the format allows it)."""

    name: str
    config: dict[str, Any]
    weights: dict[str, mx.array]
    again: Callable[[], dict[str, mx.array]]
    """The weights once more, which stay in memory only if `weights` do."""
    write_tokenizer: Callable[[Path], None]


def convert(
    src: str | Path,
    dst: Path,
    *,
    revision: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    recipe: str | None = None,
    dtype: str | None = None,
    hub_id: str | None = None,
) -> Converted:
    """Convert a checkpoint to an MLX model folder.

    Args:
        src: hub id, folder or .gguf file.
        dst: the new folder, which appears when it is whole.
        revision: branch, tag or commit of a hub id.
        bits: bits per weight; without it, a recipe, or another mode than affine nothing is quantized.
        group_size: weights that share a scale; the mode's default without it.
        mode: one of `MODES`.
        recipe: one of `RECIPES`, which give each layer its bits.
        dtype: type of what is not quantized; by default the source's.
        hub_id: the id that the folder remembers where `src` is not one.

    Raises:
        ConfigError: options that do not go together.
        CheckpointError: the source cannot be used.
        UnsupportedError: an architecture or a format that is not read.
        OutputError: `dst` is not empty or cannot be written.
    """
    start, dst = time.perf_counter(), Path(dst)
    quantize = check_options(bits, group_size, mode, recipe, dtype)
    with writing.writing(dst) as folder:
        source = _open(str(src), revision, keep_quantized=not quantize and dtype is None)
        config = dict(source.config)
        if hub_id is not None and "source" not in remembered(config):
            config = remember(config, source=hub_id)
        if quantize:
            _refuse_broken(source)  # among groups of four bits a NaN would be lost
        model = build(config, source.weights, source.name)
        if dtype is not None:
            _cast(model, models.DTYPES[dtype])
        if quantize:
            config = _quantize(model, config, bits, group_size, mode, recipe)
        config = names.into_config(_written_config(model, config), names.names_of(model))
        writing.require_space(dst, sum(array.nbytes for _, array in tree_flatten(model.parameters())))
        parameters, per_weight = _measure(model)
        _save(folder, model, config, source)
        refuse_not_finite(folder, source.name, dtype)
    return Converted(
        path=dst,
        bytes=writing.folder_bytes(dst),
        bits_per_weight=per_weight,
        parameters=parameters,
        seconds=time.perf_counter() - start,
        dtype=config["dtype"],
        remark="; ".join(filter(None, (fields.remark(config["model_type"]), unread.remark(model.unread))))
        or None,
    )


def write_mlx(
    loaded: models.LanguageModel,
    folder: Path,
    *,
    dst: Path,
    dtype: str,
    quantize: tuple[int | None, int | None, str] | None,
) -> None:
    """Write a model in memory to `folder`, on the disk of `dst`: in `dtype`, or quantized by (bits, group
    size, mode). Weights that are quantized are written out first; the model is empty afterwards."""
    from mlx_lm.utils import dequantize_model

    model = dequantize_model(loaded.model)
    if quantize and (found := not_finite(dict(tree_flatten(model.parameters())))):
        raise CheckpointError(_broken(str(loaded.path), *found))
    _cast(model, models.DTYPES[dtype])
    config = {k: v for k, v in loaded.config.items() if k not in ("quantization", "quantization_config")}
    if quantize is not None:
        bits, group_size, mode = quantize
        config = _quantize(model, config, bits, group_size, mode, None)
    config = names.into_config(_written_config(model, config), names.names_of(model))
    writing.require_space(dst, sum(array.nbytes for _, array in tree_flatten(model.parameters())))
    source = _Source(
        name=str(loaded.path),
        config=config,
        weights={},
        again=dict,
        write_tokenizer=lambda to: copy_tokenizer(loaded.path, to),
    )
    _save(folder, model, config, source)


def check_options(
    bits: int | None, group_size: int | None, mode: str, recipe: str | None, dtype: str | None
) -> bool:
    """Whether to quantize; ConfigError for options that do not go together."""
    if mode not in MODES:
        raise ConfigError(f"--mode {mode!r} is not one of {', '.join(MODES)}")
    if dtype is not None and dtype not in models.DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not one of {', '.join(models.DTYPES)}")
    if recipe is not None and recipe not in RECIPES:
        raise ConfigError(f"--recipe {recipe!r} is not one of {', '.join(RECIPES)}")
    if recipe is not None and (bits is not None or mode != "affine"):
        raise ConfigError("--recipe chooses bits and mode itself; give it without --bits and --mode")
    quantize = bits is not None or recipe is not None or mode != "affine"
    if group_size is not None and not quantize:
        raise ConfigError("--group-size without --bits does nothing; give --bits as well")
    for option, value, known in zip(("bits", "group-size"), (bits, group_size), MODES[mode], strict=True):
        if value is not None and value not in known:
            raise ConfigError(
                f"--{option} {value} is not one of {', '.join(map(str, known))} for mode {mode}"
            )
    return quantize


# Sources ---------------------------------------------------------------------------------------------------


def _open(src: str, revision: str | None, *, keep_quantized: bool) -> _Source:
    if Path(src).suffix == ".gguf":
        return _gguf(Path(src), keep_quantized=keep_quantized)
    folder = models.locate(src, revision=revision)
    refuse_links(folder)
    config = models.from_hub(models.read_config(folder), src, revision)
    weights = read_weights(folder) or _read_bins(folder)
    if not weights and not Path(src).exists():
        weights = _read_bins(_download_bin(src, revision))
    if not weights:
        raise CheckpointError(f"{src}: has no weights ({SINGLE}, {SINGLE_BIN}, or the index of either)")
    return _Source(
        name=src,
        config=config,
        weights=weights,
        again=lambda: read_weights(folder) or dict(weights),
        write_tokenizer=lambda to: copy_tokenizer(folder, to),
    )


def _gguf(file: Path, *, keep_quantized: bool) -> _Source:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    from mlx_adapters.convert.gguf import read_gguf

    found = read_gguf(file, keep_quantized=keep_quantized)
    config = model_config.normalise(found.config)
    if found.quantization:
        config |= {"quantization": found.quantization}
    return _Source(
        name=str(file),
        config=config,
        weights=found.weights,
        again=lambda: dict(found.weights),
        write_tokenizer=found.write_tokenizer,
    )


def _read_bins(folder: Path) -> dict[str, mx.array]:
    from mlx_adapters.files.torch_bin import read_bin

    weights: dict[str, mx.array] = {}
    for shard in bin_files(folder):
        weights |= read_bin(shard)
    return weights


def _download_bin(src: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(src, revision=revision, allow_patterns=list(_BIN)))
    except Exception as error:
        raise CheckpointError(f"{src}: the hub did not give its weights ({one_line(error)})") from None


def refuse_links(folder: Path) -> None:
    """CheckpointError where what is read of a model folder lies outside it."""
    settings = [folder / name for name in ("config.json", "generation_config.json")]
    writing.refuse_links_out(folder, [*settings, *weight_files(folder), *bin_files(folder)])


def copy_tokenizer(folder: Path, to: Path) -> None:
    """Copy the tokenizer's files and the generation settings; CheckpointError where there are none."""
    if not any((folder / name).exists() for name in _KINDS):
        raise CheckpointError(f"{folder}: has no tokenizer ({' or '.join(_KINDS)}); copy it there first")
    found = {file for pattern in _TOKENIZER for file in folder.glob(pattern) if file.is_file()}
    writing.refuse_links_out(folder, found)
    for file in found:
        if file.suffix != ".py":
            shutil.copyfile(file, to / file.name)
    if not (folder / "tokenizer.json").exists() and (folder / "tokenizer.model").exists():
        from mlx_adapters.convert.tokenizer import ensure_tokenizer

        ensure_tokenizer(folder, to)
    if not (to / "tokenizer.json").exists() and (folder / "ice_text.model").exists():
        from mlx_adapters.convert.chatglm_tokenizer import chatglm_tokenizer

        chatglm_tokenizer(folder, to)
    if (folder / "generation_config.json").exists():
        shutil.copyfile(folder / "generation_config.json", to / "generation_config.json")


def write_ends(folder: Path, source: str | Path) -> None:
    """Name every token that ends an answer in the configuration of a folder that is being written; an error
    names the `source` that its files are from."""
    config = models.read_config(folder)
    try:
        ends.store(folder, ends.stop_tokens(folder, config, models.read_tokenizer(folder, config)))
    except (CheckpointError, UnsupportedError) as error:
        raise type(error)(str(error).replace(str(folder), str(source))) from None


# Models ----------------------------------------------------------------------------------------------------


def _refuse_broken(source: _Source) -> None:
    """CheckpointError for NaN or infinity in the weights that the model takes of its source."""
    model = build(dict(source.config), source.again(), source.name)
    weights = dict(tree_flatten(model.parameters()))
    del model
    if found := not_finite(weights):
        raise CheckpointError(_broken(source.name, *found))


def refuse_not_finite(folder: Path, name: str, dtype: str | None) -> None:
    """CheckpointError for NaN or infinity in what was written to `folder`: the model `name` in `dtype`."""
    for file in weight_files(folder):
        written: Any = mx.load(str(file))
        if found := not_finite(written):
            tensor, what = found
            if what == "infinity" and dtype == "float16":
                raise CheckpointError(
                    f"{name}: {tensor} has values beyond 65504, the largest of float16. Use bfloat16 or "
                    "float32"
                )
            raise CheckpointError(_broken(name, *found))


def _broken(name: str, tensor: str, what: str) -> str:
    return f"{name}: {tensor} holds {what}: the checkpoint is damaged, or its training diverged"


def _cast(model: Any, dtype: mx.Dtype) -> None:
    """Turn the weights into `dtype`, but for those that mlx-lm's model file keeps in their precision."""
    cast(model, dtype, getattr(model, "cast_predicate", lambda path: True))


def _quantize(
    model: Any,
    config: dict[str, Any],
    bits: int | None,
    group_size: int | None,
    mode: str,
    recipe: str | None,
) -> dict[str, Any]:
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model

    if config.get("quantization"):
        raise UnsupportedError(
            f"The source is already quantized to {config['quantization'].get('bits')} bits. "
            "Convert the original checkpoint instead, or leave out --bits"
        )
    predicate = None
    if recipe is not None:
        try:
            predicate = mixed_quant_predicate_builder(recipe, model, group_size or 64)
        except ValueError:
            raise UnsupportedError(
                f"--recipe {recipe} needs layers named down_proj; {config['model_type']} has none. Use --bits"
            ) from None
    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints; a library returns
        _, config = quantize_model(model, config, group_size, bits, mode=mode, quant_predicate=predicate)
    if not any(hasattr(module, "bits") for module in model.modules()):
        size = config["quantization"]["group_size"]
        raise ConfigError(
            f"--group-size {size} divides no layer's width, so nothing was quantized; use a smaller one"
        )
    return config


def _written_config(model: Any, config: dict[str, Any]) -> dict[str, Any]:
    floats: dict[str, int] = {}
    for path, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating) and not path.endswith((".scales", ".biases")):
            kind = str(array.dtype).removeprefix("mlx.core.")
            floats[kind] = floats.get(kind, 0) + array.size
    largest = max(floats, key=lambda kind: floats[kind]) if floats else "float32"
    return model_config.to_transformers(config | {"dtype": largest})


def _measure(model: Any) -> tuple[int, float]:
    from mlx_lm.utils import compute_bits_per_weight, get_total_parameters

    return int(get_total_parameters(model)), float(compute_bits_per_weight(model))


def _save(folder: Path, model: Any, config: dict[str, Any], source: _Source) -> None:
    from mlx_lm.utils import save_config, save_model

    source.write_tokenizer(folder)
    save_config(dict(config), folder / "config.json")
    write_ends(folder, source.name)
    source.weights.clear()  # or every array would stay in memory once it is evaluated
    save_model(folder, model, donate_model=True)
