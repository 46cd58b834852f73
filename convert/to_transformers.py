"""Write a model folder as a full-precision Hugging Face checkpoint that transformers opens.

mlx-lm keeps the Hugging Face names for most architectures; for gpt2, gptj and gpt_neox it renames them
(interop: transformers would load such a folder with random weights and only log it), so they are renamed
back here, and GPT-2's Conv1D weights transposed back.
"""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_adapters.methods.base import plain_weight
from mlx_adapters.models import config as model_config
from mlx_adapters.models import sites

__all__ = ["dequantized_weights", "quiet_transformers", "write_transformers"]

_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")
_QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and notes on its own future: the caller reports what it finds."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def dequantized_weights(model: nn.Module) -> dict[str, mx.array]:
    """All parameters of `model` in floating point, by MLX path."""
    weights = dict(tree_flatten(model.parameters()))
    for path, module in model.named_modules():
        if isinstance(module, _QUANTIZED):
            weights[f"{path}.weight"] = plain_weight(module)
            weights.pop(f"{path}.scales", None)
            weights.pop(f"{path}.biases", None)
    return weights


def write_transformers(model: nn.Module, config: dict[str, Any], dst: Path) -> Path:
    """Write `model` (without an adapter) to `dst` in float32 under Hugging Face's names; returns `dst`."""
    model_type = config["model_type"]
    named = {}
    for path, array in dequantized_weights(model).items():
        array = array.astype(mx.float32)
        if model_type == "gpt2" and _CONV1D.search(path):
            array = mx.contiguous(array.T)
        named[sites.to_hf(path, model_type)] = array
    dst.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(dst / "model.safetensors"), named, metadata={"format": "pt"})
    fields = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    fields = model_config.to_transformers(fields) | {"dtype": "float32", "torch_dtype": "float32"}
    (dst / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return dst
