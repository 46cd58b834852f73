"""Tiny models of the families people adapt, written by transformers: what every claim about one is tried on.

A family is a `model_type` with a realistic structure in the small: both kinds of layers in hybrids, windows
that the test text passes, head widths that are not width / heads, the rope and the scaling that the released
models have, biases where they have them. `FAMILIES` has the fields; a name may be `model_type:variant`.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from tiny import VOCAB, make_tokenizer

__all__ = ["FAMILIES", "TEXT", "WRAPPERS", "make_family", "model_type_of", "opened"]

Fields = dict[str, Any]

TEXT = [[4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [30, 11, 45, 9, 8, 60, 6, 5, 33, 3, 21, 9, 8, 7]]
"""Two texts of 14 tokens: longer than every window of the table."""

_WINDOW = 6  # shorter than the text
_FULL, _SLIDING, _LINEAR, _CONV, _MAMBA = (
    "full_attention",
    "sliding_attention",
    "linear_attention",
    "conv",
    "mamba",
)

# Widths are multiples of 32, so that every matrix can be quantized in groups of 32.
_BASE: Fields = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_HEADS: Fields = {"head_dim": 16}  # 4 heads of 16 on a width of 32
_EXPERTS: Fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED: Fields = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
_GPT: Fields = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_MLA: Fields = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_DELTA: Fields = {
    "num_hidden_layers": 4,
    "layer_types": [_LINEAR, _FULL, _LINEAR, _LINEAR],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def _rope(theta: float, **others: Any) -> Fields:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | others}


def _yarn(theta: float, factor: float, original: int = 64, **others: Any) -> Fields:
    return _rope(theta, rope_type="yarn", factor=factor, original_max_position_embeddings=original, **others)


def _llama3(theta: float, factor: float) -> Fields:
    return _rope(
        theta,
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )


def _by_layer(sliding: float, full: float, **others: Any) -> Fields:
    """Two kinds of layers, each with a rope of its own."""
    return {
        "rope_parameters": {
            _SLIDING: {"rope_type": "default", "rope_theta": sliding},
            _FULL: {"rope_type": "default", "rope_theta": full} | others,
        }
    }


def _windows(*kinds: str) -> Fields:
    return {"layer_types": list(kinds), "num_hidden_layers": len(kinds), "sliding_window": _WINDOW}


_GEMMA3: Fields = (
    _BASE
    | _HEADS
    | _windows(_SLIDING, _SLIDING, _FULL)
    | _by_layer(10000.0, 1e6, rope_type="linear", factor=8.0)
    | {"query_pre_attn_scalar": 24}
)
_GEMMA3N: Fields = (
    _BASE
    | _HEADS
    | _windows(_SLIDING, _FULL, _SLIDING, _FULL)
    | _by_layer(10000.0, 1e6)
    | {
        "intermediate_size": [64] * 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 32,
        "altup_num_inputs": 2,
        "laurel_rank": 32,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    }
)
_GEMMA4: Fields = (
    _BASE
    | _HEADS
    | _windows(_SLIDING, _FULL, _SLIDING, _FULL)
    | _by_layer(10000.0, 1e6, rope_type="proportional", partial_rotary_factor=0.25)
    | {
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 32,
        "per_layer_config": {str(index): {"head_dim": 32} for index in (1, 3)},
        "final_logit_softcapping": 30.0,
    }
)
_GEMMA4_MOE: Fields = (
    {name: value for name, value in _GEMMA4.items() if name != "num_kv_shared_layers"}
    | _windows(_SLIDING, _FULL)
    | {
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "attention_k_eq_v": True,
        "per_layer_config": {"1": {"head_dim": 32, "num_key_value_heads": 1}},
    }
)
_QWEN35: Fields = _BASE | _HEADS | _DELTA | _rope(1e7, partial_rotary_factor=0.25)
_QWEN35_MOE: Fields = _QWEN35 | _EXPERTS | {"shared_expert_intermediate_size": 32}
_MISTRAL3_TEXT: Fields = _BASE | _HEADS | _rope(1e9) | {"model_type": "mistral", "sliding_window": None}
_MINISTRAL3: Fields = _BASE | _HEADS
_MINISTRAL3 |= _yarn(
    1e6, 16.0, 8, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1
)
_TOWER: Fields = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "vision_use_head": False,
}
_QWEN_TOWER: Fields = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 8,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}

FAMILIES: dict[str, Fields] = {
    "llama": _BASE | _HEADS | _llama3(500000.0, 8.0) | {"attention_bias": True, "mlp_bias": True},
    "mistral": _BASE | _HEADS | _rope(10000.0) | {"sliding_window": _WINDOW},
    "ministral3": _MINISTRAL3,
    "qwen2": _BASE | _yarn(1e6, 4.0),
    "qwen2:windows": _BASE
    | _rope(1e6)
    | {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1},
    "qwen2_moe": _BASE
    | _EXPERTS
    | _rope(1e6)
    | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1, "norm_topk_prob": False},
    "qwen3": _BASE | _HEADS | _yarn(1e6, 4.0),
    "qwen3_moe": _BASE | _HEADS | _EXPERTS | _rope(1e7) | {"decoder_sparse_step": 1, "norm_topk_prob": True},
    "qwen3_moe:yarn": _BASE
    | _HEADS
    | _EXPERTS
    | _yarn(1e6, 4.0)
    | {"decoder_sparse_step": 1, "norm_topk_prob": True},
    "qwen3_next": _BASE
    | _HEADS
    | _DELTA
    | _EXPERTS
    | _rope(1e7, partial_rotary_factor=0.25)
    | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "qwen3_5_text": _QWEN35,
    "qwen3_5_moe_text": _QWEN35_MOE,
    "gemma": _BASE | _HEADS | _rope(10000.0),
    "gemma2": _BASE
    | _HEADS
    | _windows(_SLIDING, _FULL)
    | _rope(10000.0)
    | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA3,
    "gemma3n_text": _GEMMA3N,
    "gemma4_text": _GEMMA4,
    "gemma4_text:experts": _GEMMA4_MOE,
    "phi": _BASE | _rope(10000.0, partial_rotary_factor=0.5),
    "phi3": _BASE | _rope(10000.0) | {"sliding_window": _WINDOW},
    "phi3:long": _BASE
    | {"original_max_position_embeddings": 64}
    | _rope(
        10000.0,
        rope_type="longrope",
        short_factor=[1.0, 1.1, 1.3, 1.5],
        long_factor=[1.0, 1.5, 3.0, 6.0],
        original_max_position_embeddings=64,
    ),
    "phimoe": _BASE
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    | _rope(10000.0)
    | {"attention_bias": True, "lm_head_bias": True, "sliding_window": None},
    "gpt_oss": _BASE
    | _HEADS
    | _windows(_SLIDING, _FULL)
    | _yarn(150000.0, 32.0, 64, beta_fast=32.0, beta_slow=1.0, truncate=False)
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "smollm3": _BASE | _rope(5e6) | {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "lfm2": _BASE
    | _rope(1e6)
    | {
        "num_hidden_layers": 3,
        "layer_types": [_CONV, _FULL, _CONV],
        "block_multiple_of": 32,
        "block_auto_adjust_ff_dim": True,
        "intermediate_size": 96,
    },
    "lfm2_moe": _BASE
    | _EXPERTS
    | _rope(1e6)
    | {
        "num_hidden_layers": 3,
        "layer_types": [_CONV, _FULL, _CONV],
        "num_dense_layers": 1,
        "use_expert_bias": True,
        "norm_topk_prob": True,
    },
    "granite": _BASE
    | _rope(1e7)
    | {
        "embedding_multiplier": 2.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "granitemoe": _BASE
    | _rope(10000.0)
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "embedding_multiplier": 2.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "granitemoehybrid": _BASE
    | _rope(10000.0)
    | {
        "num_hidden_layers": 3,
        "layer_types": [_LINEAR, _FULL, _LINEAR],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "shared_intermediate_size": 64,
        "position_embedding_type": None,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "mamba_chunk_size": 8,
        "embedding_multiplier": 2.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "glm": _BASE | _HEADS | _rope(10000.0, partial_rotary_factor=0.5),
    "glm4": _BASE | _HEADS | _rope(10000.0, partial_rotary_factor=0.5),
    "glm4_moe": _BASE
    | _HEADS
    | _SHARED
    | _rope(1e6, partial_rotary_factor=0.5)
    | {"n_group": 1, "topk_group": 1, "attention_bias": True, "use_qk_norm": True},
    "deepseek_v2": _BASE
    | _MLA
    | _SHARED
    | _yarn(10000.0, 40.0, 64, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)
    | {"topk_method": "greedy"},
    "deepseek_v3": _BASE
    | _MLA
    | _SHARED
    | _yarn(10000.0, 40.0, 64, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)
    | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "norm_topk_prob": True},
    "olmo2": _BASE | _rope(500000.0),
    "olmo3": _BASE | _windows(_SLIDING, _FULL) | _by_layer(500000.0, 500000.0),
    "olmo3:yarn": _BASE
    | _windows(_SLIDING, _FULL)
    | _by_layer(
        500000.0,
        500000.0,
        rope_type="yarn",
        factor=8.0,
        original_max_position_embeddings=64,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=1.2079441541679836,
    ),
    "olmoe": _BASE | _EXPERTS | _rope(10000.0) | {"intermediate_size": 32, "norm_topk_prob": False},
    "cohere2": _BASE
    | _HEADS
    | _windows(_SLIDING, _SLIDING, _SLIDING, _FULL)
    | _rope(50000.0)
    | {"logit_scale": 0.25},
    "exaone4": _BASE | _HEADS | _windows(_SLIDING, _SLIDING, _SLIDING, _FULL) | _llama3(1e6, 16.0),
    "falcon_h1": _BASE
    | _HEADS
    | _rope(1e6)
    | {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
        "mamba_rms_norm": False,
        "embedding_multiplier": 2.0,
        "lm_head_multiplier": 0.5,
        "key_multiplier": 0.4,
        "attention_out_multiplier": 0.9,
        "attention_in_multiplier": 1.1,
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.7,
        "mlp_multipliers": [0.9, 0.6],
        "ssm_multipliers": [0.8, 0.6, 0.9, 0.7, 0.5],
    },
    "mamba2": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "expand": 2,
    },
    "nemotron_h": _BASE
    | _HEADS
    | {
        "num_hidden_layers": 4,
        "layers_block_type": [_LINEAR, "moe", _FULL, "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "routed_scaling_factor": 2.5,
    },
    "jamba": _BASE
    | {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 16,
        "mamba_dt_rank": 32,
        "use_mamba_kernels": False,
    },
    "starcoder2": _BASE | _rope(100000.0) | {"sliding_window": _WINDOW},
    "stablelm": _BASE | _rope(10000.0, partial_rotary_factor=0.25) | {"use_qkv_bias": True},
    "mixtral": _BASE
    | _rope(1e6)
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "seed_oss": _BASE | _HEADS | _rope(1e7) | {"attention_bias": True, "residual_dropout": 0.1},
    "hunyuan_v1_dense": _BASE
    | _HEADS
    | _rope(10000.0, rope_type="dynamic", alpha=1000.0, factor=1.0, mscale=1.0, mscale_all_dim=1.0),
    "ernie4_5": _BASE | _HEADS | _rope(500000.0),
    "ernie4_5_moe": _BASE
    | _rope(500000.0)
    | {
        "moe_intermediate_size": 32,
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    },
    "apertus": _BASE | _llama3(12000000.0, 8.0),
    "minimax_m2": _BASE
    | _HEADS
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    | _rope(5e6, partial_rotary_factor=0.5),
    "gpt_bigcode": _GPT,
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gptj": _GPT | {"rotary_dim": 4},
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "ffn_dim": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
    },
    "gpt2": _GPT,
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": _WINDOW,
        "max_position_embeddings": 256,
    },
    "gpt_neox": {name: value for name, value in _BASE.items() if name != "num_key_value_heads"}
    | {"intermediate_size": 128, "hidden_act": "gelu_fast"}
    | _rope(10000.0, partial_rotary_factor=0.25),
    # not named by the list, but by what it says of saved configurations
    "olmo_hybrid": _BASE
    | _DELTA
    | _rope(500000.0)
    | {"linear_num_key_heads": 4, "layer_types": [_LINEAR, _FULL] * 2},
    "exaone_moe": _BASE
    | _HEADS
    | _EXPERTS
    | _windows(_SLIDING, _SLIDING, _SLIDING, _FULL)
    | _rope(1e6)
    | {"num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "minimax": _BASE
    | _HEADS
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": [_FULL, _LINEAR], "block_size": 8}
    | _rope(1e6),
}
"""{name: fields of the configuration}; a wrapper's are in `WRAPPERS`."""

WRAPPERS: dict[str, Fields] = {
    "mistral3": {
        "text_config": _MISTRAL3_TEXT,
        "vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 16},
    },
    "mistral3:ministral": {
        "text_config": _MINISTRAL3 | {"model_type": "ministral3"},
        "vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 16},
    },
    "gemma3": {"text_config": _GEMMA3, "vision_config": _TOWER, "mm_tokens_per_image": 4},
    "gemma4": {"text_config": _GEMMA4, "vision_config": None, "audio_config": None},
    "qwen3_5": {"text_config": _QWEN35, "vision_config": _QWEN_TOWER},
    "qwen3_5_moe": {"text_config": _QWEN35_MOE, "vision_config": _QWEN_TOWER},
}
"""Published as a model of texts and images: `text_config` is the language model's. Gemma 3n's cannot be made
here: its tower is in the package timm."""

_IDS: Fields = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def model_type_of(name: str) -> str:
    """The `model_type` of a family's name."""
    return name.partition(":")[0]


def make_family(name: str, folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """Write a tiny random model of the family, and its tokenizer, to `folder`/`name`; returns that folder.

    `fields` override those of the language model's configuration. The model and config.json are written by
    transformers in float32, in the form that its version has.
    """
    import torch
    from transformers import AutoConfig

    torch.manual_seed(seed)
    model_type = model_type_of(name)
    # copies: some configurations change the objects that they are given
    if name in WRAPPERS:
        values = deepcopy(WRAPPERS[name])
        values["text_config"] |= _IDS | fields
    else:
        values = deepcopy(FAMILIES[name]) | _IDS | fields
    model = _built(AutoConfig.for_model(model_type, **values), name in WRAPPERS)
    _randomise(model)
    target = Path(folder) / name.replace(":", "-")
    model.float().save_pretrained(target)
    make_tokenizer(target)
    return target


def _built(config: Any, wrapper: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if wrapper else AutoModelForCausalLM
    return kind.from_config(config, attn_implementation="eager")


def _randomise(model: Any) -> None:
    """Move every array away from its start: what is dropped, or read as its default, shows in the logits.

    Matrices are some five times as wide as transformers draws them, which gives logits of size 1 to 10.
    """
    import torch

    kept = set(model.state_dict())
    buffers = [(name, array) for name, array in model.named_buffers() if name in kept]
    with torch.no_grad():
        for name, array in [*model.named_parameters(), *buffers]:
            if not array.is_floating_point():
                continue
            noise = torch.randn_like(array) * 0.15
            # vectors (norms, biases, a state's decay) keep the size that they start with
            starts = array.ndim < 2 or name.endswith(("A_log", ".D", "dt_bias"))
            array.copy_(array + noise if starts else noise)


def opened(folder: Path) -> Any:
    """The model in `folder` in transformers, in the class that it was saved as, ready to compare with."""
    import torch
    import transformers

    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    kind = getattr(transformers, name)
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
