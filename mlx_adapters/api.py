"""The functions of the front door that stand on several packages; the others stand in their own packages and
are named in `mlx_adapters/__init__.py`.

A path may be `str` or `Path` everywhere.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_adapters import adapter as adapters
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.adapter import combine as combining
from mlx_adapters.adapter.combine import Combined
from mlx_adapters.adapter.tree import attached, must_be_bare
from mlx_adapters.convert import checkpoint, exchange, peft
from mlx_adapters.convert import fuse as fusing
from mlx_adapters.convert.checkpoint import Converted
from mlx_adapters.convert.fuse import Fused
from mlx_adapters.convert.peft import Verdict
from mlx_adapters.cpu.blas import cache
from mlx_adapters.errors import ConfigError
from mlx_adapters.models import load as models
from mlx_adapters.models.load import LanguageModel

__all__ = ["Exported", "combine", "convert", "export", "fuse", "import_adapter", "load", "load_adapter"]

PathLike = str | Path


def load(
    source: PathLike, *, bits: int | None = None, dtype: str | None = None, revision: str | None = None
) -> LanguageModel:
    """Load a base model with its tokenizer.

    With `bits`, or from a `.gguf` file, the checkpoint is converted once into the user's cache
    (`~/.cache/mlx-adapters/models`) and loaded from there; `convert` writes it to a folder of your choice.

    Args:
        source: A hub id, a folder (a Hugging Face checkpoint or one that `convert` wrote), or a `.gguf` file.
        bits: Quantize the linear layers and the embedding to 2, 3, 4, 6 or 8 bits per weight.
        dtype: `float32`, `float16` or `bfloat16` for what is not quantized. By default float32 on a CPU,
            where other types are many times slower, and the checkpoint's type on Metal.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The model, its tokenizer, its configuration and its folder.

    Raises:
        CheckpointError: The files are missing, damaged, or not a model.
        UnsupportedError: The architecture, or something that its configuration asks for, is not supported.
    """
    if bits is None and not str(source).endswith(".gguf"):
        return models.load(source, dtype=dtype, revision=revision)
    return models.load(_converted(source, bits, revision), dtype=dtype)


def _converted(source: PathLike, bits: int | None, revision: str | None) -> Path:
    """The folder in the cache that holds `source` with so many bits, written if it is not there yet."""
    path = Path(source)
    if not path.exists():
        path = models.locate(source, revision=revision)
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    facts = [f"{file.resolve()} {file.stat().st_mtime_ns} {file.stat().st_size}" for file in files]
    key = hashlib.sha256(f"{facts} {bits}".encode()).hexdigest()[:12]
    name = str(source).strip("/").replace("/", "--")[-80:]
    folder = cache() / "models" / f"{name}-{f'{bits}bit-' if bits else ''}{key}"
    if not (folder / "config.json").exists():
        checkpoint.convert(str(source), folder, bits=bits, revision=revision)
    return folder


def load_adapter(model: LanguageModel, folder: PathLike) -> AdapterMeta:
    """Put the adapter in `folder` on a bare model: ours, or PEFT's.

    Wherever the library takes an adapter's folder, it takes its hub id too.

    Args:
        model: What `load` returned.
        folder: The adapter's folder, or its hub id: `OWNER/NAME`, `OWNER/NAME@REVISION`.

    Returns:
        What the folder says of the adapter: its method, its base model, its template, its training.

    Raises:
        AdapterError: Lists what does not fit the model.
    """
    return adapters.load(model, folder)


def convert(source: PathLike, output: PathLike, **options: Any) -> Converted:
    """Convert a checkpoint to a folder of MLX weights, quantized if asked.

    Args:
        source: A hub id, a folder, or a `.gguf` file.
        output: The new folder. It appears only when it is whole.
        **options: `bits` (2, 3, 4, 6 or 8 per weight), `group_size` (weights per scale), `mode` (affine,
            mxfp4 ...), `recipe` (mixed precision: mixed_2_6, mixed_3_4 ...), `dtype` (float32, float16,
            bfloat16), `revision` (of a hub id), `hub_id` (of a folder or file that does not name one).

    Returns:
        The folder, its size in bytes, bits per weight, and the number of parameters.

    Raises:
        ConfigError: Options that are unknown or contradict each other.
        CheckpointError: A source that is missing or damaged.
        UnsupportedError: An architecture or a format that is not supported.
        OutputError: An `output` that is not empty, or a full disk.
    """
    return checkpoint.convert(source, Path(output), **options)


def fuse(model: PathLike, adapter: PathLike, output: PathLike, **options: Any) -> Fused:
    """Merge an adapter into its base model, and write one checkpoint that needs no library.

    Args:
        model: The base model's folder or hub id.
        adapter: The adapter's folder.
        output: The new folder.
        **options: `to` ("transformers" or "mlx"), `dtype`, `bits`, `group_size` and `mode` as in `convert`,
            `verify` (compare with transformers).

    Returns:
        The folder, how far the adapter moves the logits, and how far rounding the fused weights does.

    Raises:
        ConfigError: An adapter that does not change weights, or options that contradict each other.
        UnsupportedError: A model that cannot be written.
        OutputError: An `output` that is not empty.
    """
    return fusing.fuse(model, Path(adapter), Path(output), **options)


@dataclass(frozen=True, kw_only=True)
class Exported(exchange.Exported):
    """An adapter written for another library.

    Attributes:
        path: The folder.
        format: `peft`, `adapterhub`, `llm-adapters` or `mlx-lm`.
        tensors: How many tensors PEFT reads; None for the other formats.
        bytes: The size of its files.
        base: The hub id that it names as its base model; None where the format names none.
        verdict: The comparison in PyTorch that `verify` asked for.
    """

    verdict: Verdict | None = None


def export(
    adapter: PathLike,
    output: PathLike,
    *,
    format: str = "peft",
    base: str | None = None,
    verify: bool = False,
    model: PathLike | None = None,
) -> Exported:
    """Write an adapter for another library, with a card that says how to load it.

    Args:
        adapter: The adapter's folder.
        output: The new folder.
        format: `peft` (transformers opens it too), `adapterhub`, `llm-adapters` or `mlx-lm`.
        base: The hub id of the base model, where the adapter was trained on a folder that names none.
        verify: Open the result with PEFT and transformers, and compare logits and greedy tokens.
        model: The base model's folder, where it has moved since the adapter was trained; for `verify`.

    Returns:
        What was written; `.verdict.passed` says whether PyTorch computes the same.

    Raises:
        AdapterError: An adapter that cannot be read, or that the format cannot hold.
        ConfigError: A base model without a hub id, or a format that does not have the method.
        UnsupportedError: The other library would not open it, or would compute something else.
        OutputError: An `output` that is not empty.
    """
    source, folder = Path(adapter), Path(output)
    trained_on = None
    if verify:
        given = Path(model) if model is not None else None
        trained_on = exchange.base_to_verify(adapters.read_meta(source), format, given)
    done = exchange.export(source, folder, format=format, base=base)
    verdict = peft.verify(folder, trained_on) if trained_on else None
    return Exported(**vars(done), verdict=verdict)


def import_adapter(
    source: PathLike, output: PathLike, *, model: LanguageModel | PathLike | None = None
) -> AdapterMeta:
    """Write an adapter of PEFT, AdapterHub, LLM-Adapters or mlx-lm as one of this library.

    Args:
        source: The other library's folder; its files tell the format.
        output: The new folder. It appears only when it is whole.
        model: The base model, its folder or its hub id, where `source` names none. A loaded model must carry
            no adapter, and carries none afterwards: `load_adapter(model, output)` puts the new one on it.

    Returns:
        The method with its options, and what is known of the base model.

    Raises:
        AdapterError: A folder that is not an adapter, or does not fit the model; a model that carries one.
        ConfigError: No base model is named.
        OutputError: An `output` that is not empty.
    """
    base = model if model is not None else exchange.base_of(Path(source))
    if base is None:
        raise ConfigError(f"{source}: names no base model. Say which one it is for: --model MODEL")
    loaded = base if isinstance(base, LanguageModel) else load(base)
    must_be_bare(loaded.model)
    try:
        return exchange.import_adapter(Path(source), Path(output), loaded=loaded)
    finally:
        if attached(loaded.model) is not None:
            adapters.detach(loaded)


def combine(
    folders: Sequence[PathLike], weights: Sequence[float], output: PathLike, **options: Any
) -> Combined:
    """Merge LoRA adapters of one base model, weighted, into one LoRA adapter.

    Args:
        folders: The adapters' folders.
        weights: One factor per adapter.
        output: The new folder.
        **options: `method` (linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune), `rank` of the
            result, `density` (the share of entries that is kept), `seed`.

    Returns:
        The folder, how many layers it adapts, and the rank of the update.

    Raises:
        ConfigError: Options that do not fit together.
        AdapterError: Adapters that cannot be merged.
        OutputError: An `output` that is not empty.
    """
    return combining.combine(folders, weights, Path(output), **options)
