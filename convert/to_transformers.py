"""Write a model folder as a full-precision Hugging Face checkpoint that transformers opens.

mlx-lm keeps the Hugging Face names for most architectures; for gpt2, gptj and gpt_neox it renames them
(interop: transformers would load such a folder with random weights and only log it), so they are renamed
back here, and GPT-2's Conv1D weights transposed back.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_adapters.errors import UnsupportedError
from mlx_adapters.methods.base import plain_weight
from mlx_adapters.models import config as model_config
from mlx_adapters.models.architectures.table import ARCHITECTURES, architecture
from mlx_adapters.models.load import DTYPES
from mlx_adapters.models.names import Names, Part, into_config, names_of
from mlx_adapters.models.saved_forms import encoded

__all__ = ["CHECKED", "checkpoint_tensors", "dequantized_weights", "write_transformers"]

CHECKED = frozenset(name for name, row in ARCHITECTURES.items() if row.checked)
"""The architectures whose checkpoints the tests compare with transformers'."""
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")


def checkpoint_tensors(names: Names, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The tensors that a checkpoint has, of the model's `weights`; takes out of these what it used.

    The inverse of what mlx-lm's model file does to a checkpoint, as it was measured. What has no known
    origin is left.
    """
    made: dict[str, mx.array] = {}
    pieces: dict[str, list[tuple[Part, mx.array]]] = {}
    for path in list(weights):
        parts, start = names.parts(path), 0
        if not parts:
            continue
        array = weights.pop(path)
        for part in parts:
            if part.stacked:
                made |= {part.source.replace("*", str(n)): array[n] for n in range(part.stacked)}
                continue
            here = (slice(None),) * part.along + (slice(start, start + part.count),)
            rows = array[here] if part.rows else array
            start += part.count
            pieces.setdefault(part.source, []).append((part, _before(part, rows)))
    for source, found in pieces.items():
        if all(part.rows is None for part, _ in found):
            made[source] = found[0][1]
            continue
        order = np.concatenate([np.arange(*part.rows) for part, _ in found if part.rows])
        first = found[0][0]
        axis = first.axes[first.along] if first.axes else first.along
        whole = mx.concatenate([rows for _, rows in found], axis=axis)
        made[source] = mx.take(whole, mx.array(np.argsort(order)), axis=axis)
    return made


def _before(part: Part, array: mx.array) -> mx.array:
    """Rows as they were before mlx-lm changed them."""
    if part.scale != 1 or part.shift != 0:
        array = (array.astype(mx.float32) - part.shift) / part.scale
    if part.axes is not None:
        array = mx.contiguous(array.transpose(*np.argsort(part.axes).tolist()))
    return array


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
    model: nn.Module,
    config: dict[str, Any],
    dst: Path,
    *,
    dtype: str = "float32",
    shard: int = 5 << 30,
    beside: Mapping[str, mx.array] | None = None,
) -> Path:
    """Write `model` (without an adapter) to `dst` in `dtype` under Hugging Face's names; returns `dst`.

    Files hold at most `shard` bytes. `beside` are tensors that go along as they are. Raises UnsupportedError
    for a mixture of experts whose names are not known here: transformers would fill such a layer with random
    weights and only log it.
    """
    found = names_of(model)
    weights = dequantized_weights(model)
    made = checkpoint_tensors(found, weights) if found else {}
    named = {name: array.astype(DTYPES[dtype]) for name, array in made.items()}
    for path, array in weights.items():
        for name, part in _hf_names(path, array, config["model_type"]):
            named[name] = part.astype(DTYPES[dtype])
    dst.mkdir(parents=True, exist_ok=True)
    _save(named | dict(beside or {}), dst, shard)
    fields = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    fields = into_config(fields, None)  # the names are the checkpoint's own again
    fields = model_config.to_transformers(fields) | {"dtype": dtype, "torch_dtype": dtype}
    (dst / "config.json").write_text(json.dumps(encoded(fields), indent=2) + "\n", encoding="utf-8")
    return dst


_EXPERTS = re.compile(r"^(.*)\.(?:switch_mlp|experts)\.(gate|up|down)_proj\.weight$")


def _hf_names(path: str, array: mx.array, model_type: str) -> Iterator[tuple[str, mx.array]]:
    """(name, array) as the checkpoint has them: renamed, transposed, or one for each expert."""
    row = architecture(model_type)
    array = array.reshape(1) if array.ndim == 0 else array  # as PyTorch keeps a number that trains
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
