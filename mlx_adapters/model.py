"""Load a model: a folder (converted, or straight from Hugging Face) or a hub id, ready to train or answer."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_adapters import backend, threads
from mlx_adapters.errors import AdaptersError, CheckpointError, ConfigError, reading
from mlx_adapters.models import config as model_config
from mlx_adapters.parse import from_json

__all__ = ["DTYPES", "Loaded", "describe", "fingerprint", "load", "locate", "read_config", "read_tokenizer"]

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


_ENDS = 1 << 20  # bytes of a weight file that are hashed, at both ends


@dataclass(frozen=True)
class Loaded:
    """A model in memory with what came with it. `config` is the normalised `config.json`."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    path: Path


def locate(source: str | Path, *, revision: str | None = None) -> Path:
    """The folder of `source`: itself when it exists, else a snapshot of that hub id."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{path}: is a file, not a model folder. Convert it first: mlx-adapters convert {path} DST"
        )
    text = str(source)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise CheckpointError(f"{text}: no such folder, and not a hub id like 'owner/name'")
    from huggingface_hub import snapshot_download
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    patterns = [pattern for pattern in DEFAULT_ALLOW_PATTERNS if pattern != "*.py"]
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many unrelated types for "could not download"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{text}: no such folder, and the hub did not give it ({reason})") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The normalised `config.json` of a model folder; CheckpointError if missing or broken."""
    file = folder / "config.json"
    try:
        raw = from_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no config.json, so it is not a model folder") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise CheckpointError(f"{file}: field 'model_type' is missing, so the architecture is unknown")
    with reading(file, CheckpointError):
        return model_config.normalise(raw)


def load(
    source: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    answering: bool = False,
    lazy: bool = False,
) -> Loaded:
    """Load weights and tokenizer.

    On CPU floating-point weights become float32 (other types are many times slower there), on Metal they
    keep the checkpoint's type; `dtype` (float32, float16, bfloat16) overrides both. Quantized weights stay
    quantized, unless the model is for `answering` on a CPU with room for the written-out weights: each token
    would write them out again. With `lazy` a weight is read from disk when it is first used.
    Raises CheckpointError or UnsupportedError.
    """
    from mlx_lm.utils import dequantize_model, load_model

    folder = locate(source, revision=revision)
    config = read_config(folder)
    if not list(folder.glob("model*.safetensors")):
        raise CheckpointError(
            f"{folder}: has no model*.safetensors. Convert it first: mlx-adapters convert {folder} DST"
        )
    try:
        model, config = load_model(
            folder, lazy=True, model_config=config, get_model_classes=model_config.classes
        )
        _cast(model, _wanted(dtype))
        if answering and _room_for_dense(model):
            model = dequantize_model(model)
        if not lazy:
            mx.eval(model.parameters())
            backend.warn_if_slow()
            threads.settle()
    except AdaptersError:
        raise
    except Exception as error:  # mlx raises RuntimeError and ValueError for files, names and shapes alike
        raise CheckpointError(f"{folder}: the weights do not fit ({_first_line(error)})") from None
    backend.speed_up(model)
    tokenizer = read_tokenizer(folder, config)
    return Loaded(model=model, tokenizer=tokenizer, config=config, path=folder)


def read_tokenizer(folder: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """The tokenizer of a model folder, which ends answers where `config` says; CheckpointError if broken."""
    from mlx_lm.utils import load_tokenizer

    try:
        return load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({_first_line(error)})") from None


def describe(loaded: Loaded) -> dict[str, Any]:
    """What an adapter must remember of its base, to refuse another one."""
    config = loaded.config
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "_name_or_path")
    described = {key: config[key] for key in keys if config.get(key) is not None}
    if quantization := config.get("quantization"):
        described["quantization"] = {
            k: quantization[k] for k in ("bits", "group_size", "mode") if k in quantization
        }
    described["path"] = str(loaded.path.resolve())
    return described


def _room_for_dense(model: nn.Module) -> bool:
    """Whether float32 copies of the quantized weights take less than half of the free memory of a CPU."""
    dense = sum(
        4 * m.scales.size * m.group_size
        for m in model.modules()
        if isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    )
    return backend.on_cpu() and 0 < dense < backend.free_memory() / 2


def _wanted(dtype: str | None) -> mx.Dtype | None:
    if dtype is None:
        return backend.compute_dtype()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _cast(model: nn.Module, dtype: mx.Dtype | None) -> None:
    if dtype is None:
        return
    model.update(
        tree_map(lambda p: p.astype(dtype) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters())
    )


def fingerprint(folder: Path) -> str:
    """A short hash of a model folder's configuration and weights, from their sizes and their ends: enough to
    notice another model at the same place, whatever the place is called."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("model*.safetensors"))]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for start in (0, max(0, size - _ENDS)):
                stream.seek(start)
                digest.update(stream.read(_ENDS))
    return digest.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:400] if lines else type(error).__name__
