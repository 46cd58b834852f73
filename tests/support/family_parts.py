"""What the configurations in `family_fields` are made of: sizes, ropes, kinds of layers, and towers."""

from typing import Any

from tiny import VOCAB

Fields = dict[str, Any]

WINDOW = 6  # shorter than the text
FULL, SLIDING, LINEAR, CONV = (
    "full_attention",
    "sliding_attention",
    "linear_attention",
    "conv",
)

# Widths are multiples of 32, and of 64 where routers read: every matrix can be quantized in groups.
BASE: Fields = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
HEADS: Fields = {"head_dim": 32}  # 4 heads of 32 on a width of 64
EXPERTS: Fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED: Fields = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
GPT: Fields = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
MLA: Fields = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
MAMBA: Fields = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 8,
    "time_step_rank": 32,
    "conv_kernel": 4,
}
DELTA: Fields = {
    "num_hidden_layers": 4,
    "layer_types": [LINEAR, LINEAR, LINEAR, FULL],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def rope(theta: float, **others: Any) -> Fields:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | others}


def yarn(theta: float, factor: float, original: int = 64, **others: Any) -> Fields:
    return rope(theta, rope_type="yarn", factor=factor, original_max_position_embeddings=original, **others)


def llama3(theta: float, factor: float) -> Fields:
    return rope(
        theta,
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )


def by_layer(sliding: float, full: float, **others: Any) -> Fields:
    """Two kinds of layers, each with a rope of its own."""
    return {
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": sliding},
            FULL: {"rope_type": "default", "rope_theta": full} | others,
        }
    }


def windows(*kinds: str) -> Fields:
    return {"layer_types": list(kinds), "num_hidden_layers": len(kinds), "sliding_window": WINDOW}


GEMMA3: Fields = (
    BASE
    | HEADS
    | windows(SLIDING, SLIDING, FULL)
    | by_layer(10000.0, 1e6, rope_type="linear", factor=8.0)
    | {"query_pre_attn_scalar": 40}
)
GEMMA3N: Fields = (
    BASE
    | HEADS
    | windows(SLIDING, FULL, SLIDING, FULL)
    | by_layer(10000.0, 1e6)
    | {
        "intermediate_size": [96] * 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 32,
        "altup_num_inputs": 2,
        "laurel_rank": 32,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    }
)
GEMMA4: Fields = (
    BASE
    | HEADS
    | windows(SLIDING, FULL, SLIDING, FULL)
    | by_layer(10000.0, 1e6, rope_type="proportional", partial_rotary_factor=0.25)
    | {
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 32,
        "per_layer_config": {str(index): {"head_dim": 64} for index in (1, 3)},
        "final_logit_softcapping": 30.0,
    }
)
GEMMA4_MOE: Fields = (
    {name: value for name, value in GEMMA4.items() if name != "num_kv_shared_layers"}
    | windows(SLIDING, FULL)
    | {
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "attention_k_eq_v": True,
        "per_layer_config": {"1": {"head_dim": 64, "num_key_value_heads": 1}},
    }
)
QWEN35: Fields = BASE | HEADS | DELTA | rope(1e7, partial_rotary_factor=0.25)
QWEN35_MOE: Fields = QWEN35 | EXPERTS | {"shared_expert_intermediate_size": 32}
MISTRAL3_TEXT: Fields = BASE | HEADS | rope(1e9) | {"model_type": "mistral", "sliding_window": None}
MINISTRAL3: Fields = BASE | HEADS
MINISTRAL3 |= yarn(
    1e6, 16.0, 8, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1
)
TOWER: Fields = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "vision_use_head": False,
}
QWEN_TOWER: Fields = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 8,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
