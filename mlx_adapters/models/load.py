"""Load a model: a folder (converted, or straight from Hugging Face) or a hub id, ready to train or answer."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_adapters import device
from mlx_adapters.cpu import blas, layers, threads
from mlx_adapters.errors import (
    AdaptersError,
    CheckpointError,
    ConfigError,
    UnsupportedError,
    one_line,
    reading,
)
from mlx_adapters.files.documents import read_object
from mlx_adapters.files.hub import snapshot
from mlx_adapters.files.weights import read_weights, weight_files
from mlx_adapters.models import config as model_config
from mlx_adapters.models import own_template
from mlx_adapters.models.build import build, cast
from mlx_adapters.models.origin import remember, remembered
from mlx_adapters.models.own_template import ChatTemplate
from mlx_adapters.models.stop_tokens import stop_tokens

__all__ = [
    "DTYPES",
    "LanguageModel",
    "describe",
    "fingerprint",
    "from_hub",
    "load",
    "locate",
    "read_config",
    "read_tokenizer",
]

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


_ENDS = 1 << 20  # bytes of a weight file that are hashed, at both ends


@dataclass(frozen=True)
class LanguageModel:
    """A model in memory with what came with it. `config` is the normalised `config.json`."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    path: Path

    @property
    def template(self) -> str:
        """The prompt template of an adapter that was fused into the model; empty where there is none."""
        return remembered(self.config).get("template", "")

    @property
    def chat(self) -> ChatTemplate:
        """How chats were written for an adapter fused into the model; the text is the tokenizer's."""
        return own_template.fused(self.config)


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
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    patterns = [pattern for pattern in DEFAULT_ALLOW_PATTERNS if pattern != "*.py"] + ["ice_text.model"]
    return snapshot(text, patterns, CheckpointError, revision=revision)


def read_config(folder: Path) -> dict[str, Any]:
    """The normalised `config.json` of a model folder; CheckpointError if missing or broken."""
    file = folder / "config.json"
    try:
        raw = read_object(file, CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no config.json, so it is not a model folder") from None
    if not isinstance(raw.get("model_type"), str):
        raise CheckpointError(f"{file}: field 'model_type' is missing, so the architecture is unknown")
    with reading(file, CheckpointError):
        config = model_config.normalise(raw)
    if (extra := folder / "hf_quant_config.json").exists() and not config.get("quantization"):
        raise UnsupportedError(
            f"{extra}: says the weights are quantized by ModelOpt, which is not read here; use the model's "
            "unquantized checkpoint and --bits"
        )
    return config


def load(
    source: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    answering: bool = False,
    lazy: bool = False,
) -> LanguageModel:
    """Load a model and its tokenizer.

    Args:
        source: a model folder or a hub id.
        dtype: type of the floating-point weights: float32, float16 or bfloat16. By default float32 on a CPU,
            where other types are many times slower, and the checkpoint's type on Metal.
        revision: branch, tag or commit of a hub id.
        answering: on a CPU with enough free memory, dequantize the weights once instead of once per token.
        lazy: read each weight from disk when it is first used.

    Raises:
        CheckpointError: the folder, its weights or its tokenizer cannot be used.
        UnsupportedError: understood, but not computed here.
    """
    from mlx_lm.utils import dequantize_model

    folder = locate(source, revision=revision)
    config = from_hub(read_config(folder), source, revision)
    weights = read_weights(folder)
    if not weights:
        raise CheckpointError(
            f"{source}: has no safetensors weights. Convert it first: mlx-adapters convert {source} DST"
        )
    try:
        model = build(config, weights, str(folder))
        del weights  # a tensor that was read would stay in memory
        if precision := _precision(dtype):
            cast(model, precision)
        if answering and _room_for_dense(model):
            model = dequantize_model(model)
        if not lazy:
            mx.eval(model.parameters())
            blas.warn_if_slow()
            threads.settle()
    except AdaptersError:
        raise
    except Exception as error:  # mlx raises RuntimeError and ValueError for files, names and shapes alike
        raise CheckpointError(f"{folder}: the weights do not fit ({one_line(error)})") from None
    layers.speed_up(model)
    tokenizer = read_tokenizer(folder, config)
    return LanguageModel(model=model, tokenizer=tokenizer, config=config, path=folder)


def read_tokenizer(folder: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """The tokenizer of a model folder, which ends answers at `stop_tokens`; CheckpointError if broken."""
    from mlx_lm.utils import load_tokenizer

    try:
        # unless told, transformers asks on the terminal whether to run the folder's code
        tokenizer = load_tokenizer(folder, {"trust_remote_code": False})
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedError(_needs_code(folder)) from None
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({one_line(error)})") from None
    tokenizer.eos_token_ids = {*tokenizer.eos_token_ids, *stop_tokens(folder, config, tokenizer)}
    return tokenizer


def from_hub(config: dict[str, Any], source: str | Path, revision: str | None) -> dict[str, Any]:
    """`config`, which remembers the hub id that its model was asked for by, unless it remembers one already.

    Weights in MLX's quantization are not remembered: PyTorch cannot load them by any name.
    """
    if Path(source).exists() or config.get("quantization") or "source" in remembered(config):
        return config
    template = remembered(config).get("template")
    return remember(config, source=str(source), revision=revision, template=template)


def _needs_code(folder: Path) -> str:
    if (folder / "tokenizer.model").exists():
        remedy = f"Convert the folder, which makes a tokenizer.json: mlx-adapters convert {folder} DST"
    else:
        remedy = "Save the tokenizer in PyTorch as a fast one, and copy its tokenizer.json there"
    return f"{folder}: its tokenizer is code of its own (auto_map), which is never run. {remedy}"


def describe(loaded: LanguageModel) -> dict[str, Any]:
    """What an adapter must remember of its base, to refuse another one."""
    config = loaded.config
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    inner = config.get("text_config")
    text = config | ({k: v for k, v in inner.items() if k != "model_type"} if isinstance(inner, dict) else {})
    described = {key: text[key] for key in keys if text.get(key) is not None}
    about = remembered(config)
    if "source" in about:
        described["_name_or_path"] = about["source"]
        described |= {"revision": about["revision"]} if "revision" in about else {}
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
    return device.on_cpu() and 0 < dense < device.free_memory() / 2


def _precision(dtype: str | None) -> mx.Dtype | None:
    if dtype is None:
        return device.compute_dtype()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def fingerprint(folder: Path) -> str:
    """A short hash of a model folder's configuration and weights, from their sizes and their ends: enough to
    notice another model at the same place, whatever the place is called."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *weight_files(folder)]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for start in (0, max(0, size - _ENDS)):
                stream.seek(start)
                digest.update(stream.read(_ENDS))
    return digest.hexdigest()[:16]
