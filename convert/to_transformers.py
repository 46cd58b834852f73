"""Write a model folder as a full-precision Hugging Face checkpoint that transformers opens.

mlx-lm keeps the Hugging Face names for most architectures; for gpt2, gptj and gpt_neox it renames them
(interop: transformers would load such a folder with random weights and only log it), so they are renamed
back here, and GPT-2's Conv1D weights transposed back.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_adapters.errors import UnsupportedError
from mlx_adapters.methods.base import plain_weight
from mlx_adapters.models import config as model_config
from mlx_adapters.models.architectures.table import ARCHITECTURES, architecture
from mlx_adapters.models.load import DTYPES
from mlx_adapters.models.saved_forms import encoded

__all__ = ["CHECKED", "dequantized_weights", "write_transformers"]

CHECKED = frozenset(name for name, row in ARCHITECTURES.items() if row.checked)
"""The architectures whose checkpoints the tests compare with transformers'."""
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")


def dequantized_weights(model: nn.Module) -> dict[str, mx.array]:
    """All parameters of `model` in floating point, by MLX path."""
    weights = dict(tree_flatten(model.parameters()))
    for path, module in model.named_modules():
        if "scales" in module:
            weights[f"{path}.weight"] = plain_weight(module)
            weights.pop(f"{path}.scales", None)
            weights.pop(f"{path}.biases", None)
    return weights


def write_transformers(
    model: nn.Module, config: dict[str, Any], dst: Path, *, dtype: str = "float32", shard: int = 5 << 30
) -> Path:
    """Write `model` (without an adapter) to `dst` in `dtype` under Hugging Face's names; returns `dst`.

    Files hold at most `shard` bytes. Raises UnsupportedError for a mixture of experts whose names are not
    known here: transformers would fill such a layer with random weights and only log it.
    """
    named = {}
    for path, array in dequantized_weights(model).items():
        for name, part in _hf_names(path, array, config["model_type"]):
            named[name] = part.astype(DTYPES[dtype])
    dst.mkdir(parents=True, exist_ok=True)
    _save(named, dst, shard)
    fields = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    fields = model_config.to_transformers(fields) | {"dtype": dtype, "torch_dtype": dtype}
    (dst / "config.json").write_text(json.dumps(encoded(fields), indent=2) + "\n", encoding="utf-8")
    return dst


_EXPERTS = re.compile(r"^(.*)\.(?:switch_mlp|experts)\.(gate|up|down)_proj\.weight$")


def _hf_names(path: str, array: mx.array, model_type: str) -> Iterator[tuple[str, mx.array]]:
    """(name, array) as the checkpoint has them: renamed, transposed, or one for each expert."""
    row = architecture(model_type)
    if array.ndim == 3 and (found := _EXPERTS.match(path)):
        if row.experts is None:
            raise UnsupportedError(
                f"{path}: how a {model_type} checkpoint names its experts is not known here, so transformers "
                "cannot be given one. Fuse --to mlx, or hand on the adapter: mlx-adapters export"
            )
        for number in range(array.shape[0]):
            yield f"{found[1]}.experts.{number}.{getattr(row.experts, found[2])}.weight", array[number]
        return
    if row.conv1d and _CONV1D.search(path):
        array = mx.contiguous(array.T)
    yield row.to_hf(path), array


def _save(named: dict[str, mx.array], dst: Path, limit: int) -> None:
    shards: list[dict[str, mx.array]] = [{}]
    filled = 0
    for name, array in named.items():
        if filled + array.nbytes > limit and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = array
        filled += array.nbytes
    if len(shards) == 1:
        mx.save_safetensors(str(dst / "model.safetensors"), named, metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    total = sum(array.nbytes for array in named.values())
    named.clear()  # a shard that is written need not stay in memory
    for number in range(len(shards)):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        mx.save_safetensors(str(dst / file), shards[number], metadata={"format": "pt"})
        where |= dict.fromkeys(shards[number], file)
        shards[number] = {}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (dst / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
