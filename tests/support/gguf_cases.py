"""The families whose GGUF files are compared: {name in `families`: fields that override its own}."""

from typing import Any

__all__ = ["CASES"]

SLIDING, FULL = "sliding_attention", "full_attention"
# what a GGUF file cannot say otherwise: llama.cpp has it in its code
_GEMMA3 = {
    "query_pre_attn_scalar": 32,
    "num_hidden_layers": 7,
    "layer_types": [*[SLIDING] * 5, FULL, SLIDING],
}
# Phi-4-mini rotates three quarters of each head
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.05, 1.1, 1.15, 1.2, 1.3],
    "long_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral3": {},
    "ministral3": {},
    "mistral3:ministral": {},
    "mixtral": {},
    "smollm3": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_moe:yarn": {},
    "qwen3_next": {},
    "qwen3_5_text": {},
    "qwen3_5_moe_text": {},
    "qwen3_5": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "gemma4_text": {"use_double_wide_mlp": True},
    "gemma4_text:experts": {},
    "gemma4": {},
    "gpt_oss": {},
    "lfm2": {},
    "lfm2_moe": {},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {},
    "glm4": {"attention_bias": True},
    "glm4_moe": {},
    "olmo2": {},
    "seed_oss": {},
    "phi3": {},
    "phi3:long": {"rope_parameters": _LONGROPE},
}
