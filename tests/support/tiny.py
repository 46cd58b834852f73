"""Tiny random models in Hugging Face's format, saved by transformers itself, with a tiny tokenizer.

Norms, biases and rope settings are moved away from their defaults, so that a reader that drops one is wrong
by more than rounding.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

ARCHS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "gptj", "gpt_neox", "phi")
VOCAB = 64
_WORDS = [
    "tom",
    "has",
    "3",
    "apples",
    "and",
    "buys",
    "4",
    "more",
    ".",
    "how",
    "many",
    "?",
    "the",
    "answer",
    "is",
    "7",
    "1",
    "2",
    "5",
    "6",
    "8",
    "9",
    "0",
    "a",
    "b",
    "c",
    "d",
    "e",
    "f",
    "g",
]
_ROPE = {"rope_type": "default", "rope_theta": 777.0}
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_parameters": _ROPE,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
_SHARED_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_GPT: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_FIELDS: dict[str, dict[str, Any]] = {
    "llama": _BASE,
    "mistral": _BASE | {"sliding_window": None},
    "qwen2": _BASE,
    "qwen3": _BASE | {"head_dim": 8},
    "gemma2": _BASE | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 256},
    "gpt2": _GPT,
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_neox": {k: v for k, v in _BASE.items() if k != "num_key_value_heads"}
    | {
        "intermediate_size": 128,
        "hidden_act": "gelu_fast",
        "rope_parameters": _ROPE | {"partial_rotary_factor": 0.5},
    },
    "gemma": _BASE | {"head_dim": 8},
    "phi3": _BASE,
    "starcoder2": _BASE,
    "phi": _BASE | {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5}},
    "glm": _BASE | {"head_dim": 8, "rope_parameters": _ROPE | {"partial_rotary_factor": 0.5}},
    "mixtral": _BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    # mlx-lm does not read norm_topk_prob here; the released models have it off
    "qwen2_moe": _BASE | _EXPERTS | {"shared_expert_intermediate_size": 16, "norm_topk_prob": False},
    "qwen3_moe": _BASE | _EXPERTS | {"head_dim": 8},
    "olmoe": _BASE | _EXPERTS,
    "dots1": _BASE | _SHARED_EXPERTS | {"head_dim": 8},
    "glm4_moe": _BASE | _SHARED_EXPERTS | {"head_dim": 8},
    "deepseek_v2": _BASE
    | _SHARED_EXPERTS
    | {
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "rope_scaling": {"type": "yarn", "factor": 2.0},
    },
    "gpt_oss": _BASE
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granitemoe": _BASE
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "gemma3_text": _BASE | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 256},
    "glm4": _BASE | {"head_dim": 8},
    **dict.fromkeys(("cohere", "smollm3"), _BASE),
    **dict.fromkeys(("cohere2", "helium"), _BASE | {"head_dim": 8}),
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "ffn_dim": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
    },
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 256,
    },
}


def make_tiny(arch: str, folder: Path, *, seed: int = 0, dtype: str = "float32", **fields: Any) -> Path:
    """Write a tiny random `arch` model and its tokenizer to `folder`/`arch`; `fields` override the config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    # a copy: some configurations change the objects they are given
    config = AutoConfig.for_model(arch, **deepcopy(_FIELDS[arch] | ids | fields))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # matrices five times the usual width give logits of size 1 to 10: a wrong theta then shows
            centre = (
                1.0
                if parameter.ndim == 1 and name.endswith("weight") and not arch.startswith("gemma")
                else 0.0
            )
            parameter.copy_(centre + torch.randn_like(parameter) * 0.15)
    target = Path(folder) / arch
    model.to(getattr(torch, dtype)).save_pretrained(target)
    make_tokenizer(target)
    return target


def random_llama(**fields: Any) -> Any:
    """A random llama in memory, drawn from MLX's global state; `fields` override its arguments."""
    from mlx_lm.models import llama

    usual: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 48,
        "tie_word_embeddings": False,
    }
    return llama.Model(llama.ModelArgs(**(usual | fields)))


def make_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of `VOCAB` entries with <pad>, <s>, </s> and <unk> as 0 to 3."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(_WORDS)]
    entries += [f"w{number}" for number in range(VOCAB - len(entries))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
