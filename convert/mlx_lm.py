"""mlx-lm's adapter folders: LoRA and DoRA for `mlx_lm.generate --adapter-path`, and those it has trained.

    adapter_config.json    fine_tune_type, num_layers, lora_parameters (rank, scale, dropout, keys)
    adapters.safetensors   PATH.lora_a [in, rank], PATH.lora_b [rank, out], for DoRA PATH.m [out]

Its matrices are ours transposed, and its scale is alpha / rank. `keys` may be whole paths, so any choice of
layers can be told.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from mlx_adapters import adapter
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.adapter.from_mlx_lm import MLX_LM, settings
from mlx_adapters.adapter.reading import read_json
from mlx_adapters.convert.card import short_card
from mlx_adapters.convert.joined import joined
from mlx_adapters.convert.parts import Parts, assemble, need, take_apart
from mlx_adapters.files.writing import writing
from mlx_adapters.methods.dora import DoRA
from mlx_adapters.methods.experts import PARTS, UNGATED, by_matrix
from mlx_adapters.methods.lora import LoRA
from mlx_adapters.methods.low_rank import LowRank
from mlx_adapters.models.architectures.table import architecture
from mlx_adapters.models.load import LanguageModel
from mlx_adapters.models.sites import to_hf

__all__ = ["METHODS", "detect", "export", "import_adapter"]

_CONFIG, _WEIGHTS = adapter.CONFIG, MLX_LM
METHODS = ("lora", "dora")
_PROMPTS = (
    "`mlx_lm.generate` puts a prompt into the chat template, unless it is given --ignore-chat-template."
)
# ours -> theirs; the magnitude is a vector, the matrices are transposed
_NAMES = {"lora_a": "lora_a", "lora_b": "lora_b", "magnitude": "m"}


def detect(folder: Path) -> bool:
    """Whether `folder` is mlx-lm's."""
    return (folder / _WEIGHTS).exists()


def export(source: Path, dst: Path, *, base: str | None = None) -> None:
    """Write our LoRA or DoRA folder as mlx-lm's. AdapterError for what mlx-lm does not have."""
    parts = take_apart(source)
    method = parts.meta.method
    need(isinstance(method, LowRank), source, f"mlx-lm has LoRA and DoRA, not {method.NAME}")
    assert isinstance(method, LowRank)
    need(not architecture(parts.model_type).own, source, f"mlx-lm has no {parts.model_type} models")
    layers = {path: (own, scale) for path, own, scale in _layers(parts, method)}
    strange = sorted({name for own, _ in layers.values() for name in own} - _NAMES.keys())
    need(not strange, source, f"mlx-lm has no counterpart of {', '.join(strange)}")
    rank = max(own["lora_a"].shape[-2] for own, _ in layers.values())  # mlx-lm has one for all layers
    layers = {path: (_filled(own, rank), scale) for path, (own, scale) in layers.items()}
    scales = {scale for _, scale in layers.values()}
    need(len(scales) == 1, source, "mlx-lm has one scale for all layers")
    tensors = {
        f"{path}.{_NAMES[name]}": mx.contiguous(array.T if array.ndim == 2 else array)
        for path, (own, _) in layers.items()
        for name, array in own.items()
    }
    fields = {
        "fine_tune_type": method.NAME,
        "num_layers": parts.meta.base.get("num_hidden_layers", 0),
        "lora_parameters": {
            "rank": rank,
            "scale": scales.pop(),
            "dropout": method.dropout,
            "keys": sorted(layers),
        },
    }
    if base := base or parts.meta.hub_id:
        fields["model"] = base
    with writing(dst) as folder:
        note = "" if parts.meta.template == "chat" else _PROMPTS
        (folder / "README.md").write_text(short_card(parts.meta, "mlx-lm", base, note), encoding="utf-8")
        (folder / _CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        mx.save_safetensors(str(folder / _WEIGHTS), tensors)


def _filled(own: dict[str, mx.array], rank: int) -> dict[str, mx.array]:
    """The arrays of a layer with zeros up to `rank`, which change nothing."""
    more = rank - own["lora_a"].shape[-2]
    if more == 0:
        return own
    before = [(0, 0)] * (own["lora_a"].ndim - 2)
    a = mx.pad(own["lora_a"], [*before, (0, more), (0, 0)])
    return own | {"lora_a": a, "lora_b": mx.pad(own["lora_b"], [*before, (0, 0), (0, more)])}


def _layers(parts: Parts, method: LowRank) -> Iterator[tuple[str, dict[str, mx.array], float]]:
    """(path, arrays, scale) of each layer; a mixture of experts is three of them."""
    for path, own in parts.arrays.items():
        name = to_hf(path, parts.model_type)
        if "gate_up_a" not in own:
            yield path, own, method.at(name)[1]
            continue
        known = architecture(parts.model_type).experts
        gated, in_turns = (known.gated, known.interleaved) if known else (True, False)
        (rank, into), (_, out) = (method.at(f"{name}.{part}") for part in (PARTS if gated else UNGATED))
        names = ("gate_proj", "up_proj", "down_proj") if gated else ("fc1", "fc2")
        matrices = by_matrix(own, own["gate_up_a"].shape[0] // rank, names, interleaved=in_turns)
        for matrix, arrays in matrices.items():
            yield f"{path}.{matrix}", arrays, out if matrix == names[-1] else into


def import_adapter(source: Path, dst: Path, *, loaded: LanguageModel) -> AdapterMeta:
    """Write mlx-lm's LoRA or DoRA folder as ours. AdapterError for what is not a low-rank adapter."""
    fields = read_json(source / _CONFIG, "so it is not an adapter folder")
    kind, rank, scale, dropout = settings(fields, source / _CONFIG)
    ours = {theirs: name for name, theirs in _NAMES.items()}
    arrays: dict[str, dict[str, mx.array]] = {}
    for name, array in adapter.read_tensors(source, _WEIGHTS).items():
        path, _, leaf = name.rpartition(".")
        need(leaf in ours, source / _WEIGHTS, f"{name} is not a tensor of a {kind} adapter")
        arrays.setdefault(path, {})[ours[leaf]] = mx.contiguous(array.T) if array.ndim == 2 else array
    method: LowRank = (DoRA if kind == "dora" else LoRA)(
        rank=rank,
        alpha=scale * rank,
        dropout=dropout,
        targets=",".join(sorted({path.rpartition(".")[2] for path in arrays})),
    )
    if isinstance(method, LoRA):
        arrays, method = joined(arrays, method, loaded.model, loaded.config["model_type"])
    return assemble(loaded, method, arrays, dst=dst, source=source)
