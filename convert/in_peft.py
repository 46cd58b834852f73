"""What PEFT opens of an adapter, by what transformers has at the names of its layers.

PEFT raises at a layer whose module it does not know, and leaves out tensors whose layer it does not find
without a word. Measured on transformers 5.24 and PEFT 0.21 (`test_peft_opens.py` opens what is exported):
nothing here is needed where the names are the same and the module is a linear layer.
"""

import re
from collections.abc import Iterable

from mlx_adapters.methods.experts import EXPERT_NAMES
from mlx_adapters.models.sites import EXPERTS, SHIFTED_NORMS

__all__ = ["closed"]

# model_type -> layers that transformers has not, or has under another name
_ABSENT = {
    **dict.fromkeys(("bailing_hybrid", "exaone", "nanochat", "nemotron_h"), ".*"),
    "dbrx": r"ffn\..*",
    "gpt_oss": r"mlp\.router",
    **dict.fromkeys(("granitemoe", "granitemoehybrid"), r"router\.layer"),
    "jamba": r"feed_forward\.router",
    "kimi_linear": r"self_attn\.f_[ab]_proj",
    "laguna": r"mlp\.gate\.proj|shared_expert\.\w+",
    "lfm2_moe": r"feed_forward\.(?:gate|up|down)_proj",
    "minimax": r"self_attn\.[qk]_norm",
    "phimoe": r"block_sparse_moe\.gate",
}
# Models of text and images: transformers has model.language_model.layers there.
_INSIDE = "language_model."
# Where experts are chosen by a module of transformers' own, whose weight plain LoRA adapts as a parameter.
_ROUTED = {*EXPERTS, "ernie4_5_moe", "kimi_linear", "lfm2_moe", "mellum", "minimax", "qwen3_next"}
# Where PEFT takes EXPERT_NAMES for the stacked experts, which it adapts by plain LoRA alone.
_STACKED = {*EXPERTS, "afmoe", "deepseek_v3", "deepseek_v32", "ernie4_5_moe", "exaone_moe", "glm4_moe_lite"}
_STACKED |= {"glm_moe_dsa", "lfm2_moe", "longcat_flash", "minimax", "qwen3_next"}
_STACKED -= {"qwen2_moe"}
# Where PEFT refuses low-rank updates of the layer out of the state space, which fused kernels pass by.
_STATE_SPACE = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_ON_LAYERS = ("lora", "dora", "ia3", "vera", "ln_tuning")


def closed(method: str, model_type: str, paths: Iterable[str]) -> list[str]:
    """The last names of those Hugging Face paths at which PEFT does not open `method`."""
    found = {path.rpartition(".")[2] for path in paths if _is_closed(method, model_type, path)}
    return sorted(found)


def _is_closed(method: str, model_type: str, path: str) -> bool:
    name = path.rpartition(".")[2]
    if method not in _ON_LAYERS:
        return False
    if path.startswith(_INSIDE) or re.search(rf"(?:^|\.)(?:{_ABSENT.get(model_type, '(?!)')})$", path):
        return True
    if model_type in SHIFTED_NORMS and "norm" in name:
        return True
    if method in ("lora", "dora") and model_type in _STATE_SPACE and name == "out_proj":
        return True
    if method in ("lora", "ln_tuning"):
        return False
    if name == "gate" and model_type in _ROUTED:
        return True
    return method == "dora" and model_type in _STACKED and name in EXPERT_NAMES
