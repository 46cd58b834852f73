"""Where an architecture's linear layers live: the table of sites.

A row names, per `model_type`, the linear layers by role, the default targets of the paper's methods
(methods.md, "Defaults per architecture"), and how a path in MLX's module tree reads in the Hugging Face
checkpoint (mlx-lm renames three of them). An architecture without a row is discovered: its linear layers
are found in the tree and sorted into roles by the name of the module that holds them.
"""

import re
from dataclasses import dataclass

import mlx.nn as nn

__all__ = ["TABLE", "Sites", "from_hf", "layer_index", "linears", "sites", "to_hf"]


@dataclass(frozen=True, kw_only=True)
class Sites:
    """The linear layers of one architecture, by the last part of their names.

    `rename` holds (MLX prefix, Hugging Face prefix) pairs; the first that fits is used. `conv1d`: the
    checkpoint's linear layers are transposed, which PEFT wants to be told.
    """

    attn: tuple[str, ...]
    mlp: tuple[str, ...]
    lora: tuple[str, ...]
    rename: tuple[tuple[str, str], ...] = ()
    conv1d: bool = False


_LLAMA = Sites(
    attn=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    lora=("q_proj", "v_proj"),
)

TABLE: dict[str, Sites] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "olmo2",
            "smollm3",
            "granite",
        ),
        _LLAMA,
    ),
    "phi3": Sites(attn=("qkv_proj", "o_proj"), mlp=("gate_up_proj", "down_proj"), lora=("qkv_proj",)),
    "phi": Sites(attn=("q_proj", "k_proj", "v_proj", "dense"), mlp=("fc1", "fc2"), lora=("q_proj", "v_proj")),
    "gpt2": Sites(
        attn=("attn.c_attn", "attn.c_proj"),
        mlp=("mlp.c_fc", "mlp.c_proj"),
        lora=("c_attn",),
        rename=(("model.", "transformer."),),
        conv1d=True,
    ),
    "gptj": Sites(
        attn=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("fc_in", "fc_out"),
        lora=("q_proj", "v_proj"),
        rename=(("model.", "transformer."),),
    ),
    "gpt_neox": Sites(
        attn=("query_key_value", "attention.dense"),
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
        lora=("query_key_value",),
        rename=(
            ("model.h.", "gpt_neox.layers."),
            ("model.embed_out", "embed_out"),
            ("model.", "gpt_neox."),
        ),
    ),
}

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer inside the decoder's blocks, by path; the output head is not one of them."""
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear)) and layer_index(path) is not None
    }
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def sites(model_type: str, model: nn.Module) -> Sites:
    """The row of `model_type`, or one discovered from the module tree."""
    return TABLE.get(model_type) or _discover(model)


def layer_index(path: str) -> int | None:
    """The number of the decoder block that `path` lies in; None outside the blocks."""
    found = _LAYER.search(path)
    return int(found.group(1)) if found else None


def to_hf(path: str, model_type: str) -> str:
    """A path of the MLX module tree as the Hugging Face checkpoint writes it."""
    row = TABLE.get(model_type)
    for mlx_name, hf_name in row.rename if row else ():
        if path.startswith(mlx_name):
            return hf_name + path[len(mlx_name) :]
    return path


def from_hf(path: str, model_type: str) -> str:
    """The inverse of `to_hf`."""
    row = TABLE.get(model_type)
    for mlx_name, hf_name in row.rename if row else ():
        if path.startswith(hf_name):
            return mlx_name + path[len(hf_name) :]
    return path


def _discover(model: nn.Module) -> Sites:
    attn: dict[str, None] = {}
    mlp: dict[str, None] = {}
    for path in linears(model):
        parent, _, name = path.rpartition(".")
        (attn if "att" in parent.rpartition(".")[2].lower() else mlp)[name] = None
    queries = tuple(n for n in attn if n in ("q_proj", "v_proj")) or tuple(attn)[:1] or tuple(mlp)
    return Sites(attn=tuple(attn), mlp=tuple(mlp), lora=queries)


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
