"""The folders of LLM-Adapters (Hu et al. 2023), whose code is a fork of PEFT 0.3.

    adapter_config.json   peft_type LORA or BOTTLENECK
    adapter_model.bin     a torch file, written and read here without torch

The names of the tensors are ours. The fork derives a bottleneck's side from the layer's name alone, and takes
a list with a single target for GPT-2's fused projection: what it would read differently is refused or written
as a pattern.
"""

import json
import re
from pathlib import Path

from mlx_adapters import adapter, methods
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.adapter.reading import sound
from mlx_adapters.convert.card import short_card
from mlx_adapters.convert.grouped import ungrouped
from mlx_adapters.convert.parts import assemble, need, take_apart
from mlx_adapters.convert.peft import base_name
from mlx_adapters.convert.torch_bin_write import write_bin
from mlx_adapters.errors import AdapterError, AdaptersError
from mlx_adapters.files.torch_bin import read_bin
from mlx_adapters.files.writing import writing
from mlx_adapters.methods import LoRA, Series
from mlx_adapters.methods.peft_fields import check_fields
from mlx_adapters.models.architectures.table import ARCHITECTURES, architecture
from mlx_adapters.models.load import LanguageModel

__all__ = ["METHODS", "detect", "export", "import_adapter"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.bin"
METHODS = ("lora", "series", "parallel")
_UNREAD = ("rank_pattern", "alpha_pattern", "use_rslora")
# The layers on which the fork knows a series adapter's side.
_SIDES = (
    "gate_proj",
    "up_proj",
    "down_proj",
    "dense_h_to_4h",
    "dense_4h_to_h",
    "fc_in",
    "fc_out",
    "c_fc",
    "c_proj",
    "fc1",
    "fc2",
)


def detect(folder: Path) -> bool:
    """Whether `folder` is the fork's: old PEFT folders have the same files, but never these fields."""
    if not (folder / _WEIGHTS).exists() or not (folder / _CONFIG).exists():
        return False
    fields = adapter.read_fields(folder)
    return fields.get("peft_type") == "BOTTLENECK" or "enable_lora" in fields


def export(source: Path, dst: Path, *, base: str | None = None) -> None:
    """Write our LoRA, series or parallel folder as the fork's. AdapterError for what it reads differently."""
    parts = take_apart(source)
    method = parts.meta.method
    names = sorted({path.rpartition(".")[2] for path, own in parts.arrays.items() if "weight" not in own})
    need(
        method.NAME in METHODS,
        source,
        f"LLM-Adapters has LoRA and series and parallel adapters, not {method.NAME}",
    )
    known = ", ".join(name for name, row in ARCHITECTURES.items() if row.llm_adapters)
    row = architecture(parts.model_type)
    need(row.llm_adapters, source, f"LLM-Adapters knows {known}, not {parts.model_type}")
    fields = adapter.read_fields(source)
    if isinstance(method, LoRA):
        plain = all(own.keys() == {"lora_a", "lora_b"} for own in parts.arrays.values())
        need(plain, source, "LLM-Adapters has LoRA on linear layers only")
        # it reads no patterns and no use_rslora: one rank, and alpha / rank as the one scale
        sizes = {method.at(row.to_hf(path)) for path in parts.arrays}
        ranks, scales = (sorted(set(values)) for values in zip(*sizes, strict=True))
        need(len(ranks) == 1, source, f"LLM-Adapters has one rank, this adapter has {ranks}")
        need(len(scales) == 1, source, f"LLM-Adapters has one scale, this adapter has {scales}")
        fields = {name: fields[name] for name in fields if name not in _UNREAD}
        fields |= {"r": ranks[0], "lora_alpha": ranks[0] * scales[0]}
        fields |= {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": False}
        if isinstance(fields["target_modules"], list) and len(fields["target_modules"]) == 1:
            fields["target_modules"] = rf"(.*\.)?{re.escape(fields['target_modules'][0])}"
    if isinstance(method, Series):
        need(method.side == "auto", source, "LLM-Adapters takes the side from the name: side is not auto")
        odd = [name for name in names if name not in _SIDES]
        need(not odd, source, f"LLM-Adapters knows no series adapter on {', '.join(odd)}")
    fields["base_model_name_or_path"] = base = base_name(source, fields, base)
    with writing(dst) as folder:
        (folder / "README.md").write_text(short_card(parts.meta, "LLM-Adapters", base), encoding="utf-8")
        (folder / _CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_bin(folder / _WEIGHTS, adapter.read_tensors(source))


def import_adapter(source: Path, dst: Path, *, loaded: LanguageModel) -> AdapterMeta:
    """Write the fork's folder as ours. AdapterError names what is not supported."""
    fields = adapter.read_fields(source)
    try:
        kind = methods.claiming(fields)
        if kind.PEFT_FIELDS is not None:
            known = {name: value for name, value in fields.items() if name != "enable_lora"}
            check_fields(known, kind.PEFT_FIELDS)
        arrays, shared = adapter.by_layer(
            sound(read_bin(source / _WEIGHTS), source / _WEIGHTS), kind, loaded.config["model_type"], source
        )
        fields, arrays = ungrouped(fields, arrays)
        method = kind.from_peft(fields)
    except AdapterError as error:
        raise AdapterError(f"{source / _CONFIG}: {error}") from None
    except AdaptersError as error:
        raise AdapterError(str(error)) from None
    need(not shared, source, f"{method.NAME} is not a method of LLM-Adapters")
    return assemble(loaded, method, arrays, dst=dst, source=source)
