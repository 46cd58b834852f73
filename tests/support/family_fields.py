"""The configurations of the families, as the released models have them, in the small: {name: fields}."""

from family_parts import (
    BASE,
    CONV,
    DELTA,
    EXPERTS,
    FULL,
    GEMMA3,
    GEMMA3N,
    GEMMA4,
    GEMMA4_MOE,
    GPT,
    HEADS,
    LINEAR,
    MAMBA,
    MINISTRAL3,
    MISTRAL3_TEXT,
    MLA,
    QWEN35,
    QWEN35_MOE,
    QWEN_TOWER,
    SHARED,
    SLIDING,
    TOWER,
    WINDOW,
    Fields,
    by_layer,
    llama3,
    rope,
    windows,
    yarn,
)
from tiny import VOCAB

__all__ = ["FAMILIES", "WRAPPERS"]

FAMILIES: dict[str, Fields] = {
    "llama": BASE | HEADS | llama3(500000.0, 8.0) | {"attention_bias": True, "mlp_bias": True},
    "mistral": BASE | HEADS | rope(10000.0) | {"sliding_window": WINDOW},
    "ministral3": MINISTRAL3,
    "qwen2": BASE | yarn(1e6, 4.0),
    "qwen2:windows": BASE
    | rope(1e6)
    | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen2_moe": BASE
    | EXPERTS
    | rope(1e6)
    | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1, "norm_topk_prob": False},
    "qwen3": BASE | HEADS | yarn(1e6, 4.0),
    "qwen3_moe": BASE | HEADS | EXPERTS | rope(1e7) | {"decoder_sparse_step": 1, "norm_topk_prob": True},
    "qwen3_moe:yarn": BASE
    | HEADS
    | EXPERTS
    | yarn(1e6, 4.0)
    | {"decoder_sparse_step": 1, "norm_topk_prob": True},
    "qwen3_next": BASE
    | HEADS
    | DELTA
    | EXPERTS
    | rope(1e7, partial_rotary_factor=0.25)
    | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "qwen3_5_text": QWEN35,
    "qwen3_5_moe_text": QWEN35_MOE,
    "gemma": BASE | HEADS | rope(10000.0),
    "gemma2": BASE
    | HEADS
    | windows(SLIDING, FULL)
    | rope(10000.0)
    | {"query_pre_attn_scalar": 40, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": GEMMA3,
    "gemma3n_text": GEMMA3N,
    "gemma4_text": GEMMA4,
    "gemma4_text:experts": GEMMA4_MOE,
    "phi": BASE | rope(10000.0, partial_rotary_factor=0.5),
    "phi3": BASE | rope(10000.0) | {"sliding_window": WINDOW},
    "phi3:long": BASE
    | {"original_max_position_embeddings": 64}
    | rope(
        10000.0,
        rope_type="longrope",
        short_factor=[1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5],
        long_factor=[1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0],
        original_max_position_embeddings=64,
    ),
    "phimoe": BASE
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    | rope(10000.0)
    | {"attention_bias": True, "lm_head_bias": True, "sliding_window": None},
    "gpt_oss": BASE
    | HEADS
    | windows(SLIDING, FULL)
    | yarn(150000.0, 32.0, 64, beta_fast=32.0, beta_slow=1.0, truncate=False)
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "smollm3": BASE | rope(5e6) | {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "lfm2": BASE
    | rope(1e6)
    | {
        "num_hidden_layers": 3,
        "layer_types": [CONV, FULL, CONV],
        "block_multiple_of": 32,
        "block_auto_adjust_ff_dim": True,
        "intermediate_size": 144,
    },
    "lfm2_moe": BASE
    | EXPERTS
    | rope(1e6)
    | {
        "num_hidden_layers": 3,
        "layer_types": [CONV, FULL, CONV],
        "num_dense_layers": 1,
        "use_expert_bias": True,
        "norm_topk_prob": True,
    },
    "granite": BASE
    | rope(1e7)
    | {
        "intermediate_size": 128,
        "embedding_multiplier": 2.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "granitemoe": BASE
    | rope(10000.0)
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "embedding_multiplier": 2.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "granitemoehybrid": BASE
    | rope(10000.0)
    | {
        "num_hidden_layers": 3,
        "layer_types": [LINEAR, FULL, LINEAR],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "shared_intermediate_size": 64,
        "position_embedding_type": None,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "mamba_chunk_size": 8,
        "embedding_multiplier": 2.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "glm": BASE | HEADS | rope(10000.0, partial_rotary_factor=0.5),
    "glm4": BASE | HEADS | rope(10000.0, partial_rotary_factor=0.5),
    "glm4_moe": BASE
    | HEADS
    | SHARED
    | rope(1e6, partial_rotary_factor=0.5)
    | {"n_group": 1, "topk_group": 1, "attention_bias": True, "use_qk_norm": True},
    "deepseek_v2": BASE
    | MLA
    | SHARED
    | yarn(10000.0, 40.0, 64, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)
    | {"topk_method": "greedy"},
    "deepseek_v3": BASE
    | MLA
    | SHARED
    | yarn(10000.0, 40.0, 64, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)
    | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "norm_topk_prob": True},
    "olmo2": BASE | rope(500000.0),
    "olmo3": BASE | windows(SLIDING, FULL) | by_layer(500000.0, 500000.0),
    "olmo3:yarn": BASE
    | windows(SLIDING, FULL)
    | by_layer(
        500000.0,
        500000.0,
        rope_type="yarn",
        factor=8.0,
        original_max_position_embeddings=64,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=1.2079441541679836,
    ),
    "olmoe": BASE | EXPERTS | rope(10000.0) | {"intermediate_size": 32, "norm_topk_prob": False},
    "cohere2": BASE  # its model file wants heads of width / heads
    | windows(SLIDING, SLIDING, SLIDING, FULL)
    | rope(50000.0)
    | {"logit_scale": 0.25},
    "exaone4": BASE | HEADS | windows(SLIDING, SLIDING, SLIDING, FULL) | llama3(1e6, 16.0),
    "falcon_h1": BASE
    | HEADS
    | rope(1e6)
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
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 32,
        "state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "expand": 2,
    },
    "nemotron_h": BASE
    | HEADS
    | {
        "num_hidden_layers": 4,
        "layers_block_type": [LINEAR, "moe", FULL, "mlp"],
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
    "jamba": BASE
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
    "starcoder2": BASE | rope(100000.0) | {"sliding_window": WINDOW},
    "stablelm": BASE | rope(10000.0, partial_rotary_factor=0.25) | {"use_qkv_bias": True},
    "mixtral": BASE | rope(1e6) | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "seed_oss": BASE | HEADS | rope(1e7) | {"attention_bias": True, "residual_dropout": 0.1},
    "hunyuan_v1_dense": BASE
    | HEADS
    | rope(10000.0, rope_type="dynamic", alpha=1000.0, factor=1.0, mscale=1.0, mscale_all_dim=1.0),
    "ernie4_5": BASE | HEADS | rope(500000.0),
    "ernie4_5_moe": BASE
    | rope(500000.0)
    | {
        "moe_intermediate_size": 32,
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    },
    "apertus": BASE | llama3(12000000.0, 8.0),
    "minimax_m2": BASE
    | HEADS
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    | rope(5e6, partial_rotary_factor=0.5),
    "gpt_bigcode": GPT,
    "bloom": {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "gptj": GPT | {"rotary_dim": 4},
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "ffn_dim": 96,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 64,
    },
    "gpt2": GPT,
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": WINDOW,
        "max_position_embeddings": 256,
    },
    "gpt_neox": {name: value for name, value in BASE.items() if name != "num_key_value_heads"}
    | {"intermediate_size": 256, "hidden_act": "gelu_fast"}
    | rope(10000.0, partial_rotary_factor=0.25),
    # not named by the list, but by what it says of saved configurations
    "olmo_hybrid": BASE
    | DELTA
    | rope(500000.0)
    | {"linear_num_key_heads": 4, "layer_types": [LINEAR, FULL] * 2},
    "exaone_moe": BASE
    | HEADS
    | EXPERTS
    | windows(SLIDING, SLIDING, SLIDING, FULL)
    | rope(1e6)
    | {"num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    # of those that mlx-lm has besides, the ones that transformers has too and that are quick to make
    "nemotron": BASE | HEADS | rope(10000.0, partial_rotary_factor=0.5),
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "glm4_moe_lite": BASE | MLA | SHARED | rope(1e6) | {"mlp_layer_types": ["dense", "sparse"]},
    "afmoe": BASE
    | HEADS
    | EXPERTS
    | windows(SLIDING, SLIDING, SLIDING, FULL)
    | rope(10000.0)
    | {"num_shared_experts": 1, "num_dense_layers": 1, "route_scale": 1.5, "mup_enabled": True},
    "dbrx": {
        "vocab_size": VOCAB,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 500000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v32": BASE  # with so many heads of the index that no two tokens score the same
    | MLA
    | SHARED
    | rope(10000.0)
    | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "norm_topk_prob": True}
    | {"index_n_heads": 16, "index_head_dim": 32, "index_topk": 8},
    "solar_open": BASE
    | HEADS
    | SHARED
    | rope(1e6, partial_rotary_factor=1.0)
    | {"first_k_dense_replace": 0, "norm_topk_prob": True},
    "minicpm3": BASE
    | MLA
    | rope(
        10000.0,
        rope_type="longrope",
        short_factor=[1.0, 1.1, 1.2, 1.3],
        long_factor=[1.0, 2.0, 3.0, 4.0],
        original_max_position_embeddings=64,
    )
    | {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 32, "tie_word_embeddings": False},
    "minimax": BASE
    | HEADS
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": [FULL, LINEAR], "block_size": 8}
    | rope(1e6),
}
"""{name: fields of the configuration}; a wrapper's are in `WRAPPERS`."""

WRAPPERS: dict[str, Fields] = {
    "mistral3": {
        "tie_word_embeddings": False,
        "text_config": MISTRAL3_TEXT,
        "vision_config": {**TOWER, "model_type": "pixtral", "head_dim": 16},
    },
    "mistral3:ministral": {
        "tie_word_embeddings": False,
        "text_config": MINISTRAL3 | {"model_type": "ministral3"},
        "vision_config": {**TOWER, "model_type": "pixtral", "head_dim": 16},
    },
    "gemma3": {"text_config": GEMMA3, "vision_config": TOWER, "mm_tokens_per_image": 4},
    "gemma3n": {"text_config": GEMMA3N},
    "gemma4": {"text_config": GEMMA4, "vision_config": None, "audio_config": None},
    "qwen2_vl": {
        "tie_word_embeddings": False,
        "text_config": BASE | rope(1e6, mrope_section=[4, 2, 2]),
        "vision_config": {**QWEN_TOWER, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "tie_word_embeddings": False,
        "text_config": BASE | rope(1e6, mrope_section=[4, 2, 2]),
        "vision_config": {**QWEN_TOWER, "fullatt_block_indexes": [0], "window_size": 16},
    },
    "qwen3_vl": {
        "tie_word_embeddings": False,
        "text_config": BASE | HEADS | rope(5e6, mrope_section=[8, 4, 4], mrope_interleaved=True),
        "vision_config": {**QWEN_TOWER, "deepstack_visual_indexes": [0]},
    },
    "qwen3_5": {"text_config": QWEN35, "vision_config": QWEN_TOWER},
    "qwen3_5_moe": {"text_config": QWEN35_MOE, "vision_config": QWEN_TOWER},
}
"""Published as a model of texts and images: `text_config` is the language model's."""
