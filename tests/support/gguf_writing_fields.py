"""The metadata that llama.cpp's converter writes of a configuration, by the methods of the gguf package."""

from typing import Any

from tiny_gguf import gguf

__all__ = ["metadata", "vocabulary"]

Config = dict[str, Any]


def metadata(writer: Any, arch: str, config: Config) -> None:
    """Write the fields of a model of the architecture `arch`."""
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    head_dim = config.get("head_dim")
    width = head_dim or config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    kinds = config.get("layer_types") or []
    mixers = [kind in ("conv", "linear_attention", "mamba") for kind in kinds]
    keys = config["num_key_value_heads"]
    by_layer = arch.startswith("lfm2") or arch == "granitehybrid"
    writer.add_head_count_kv([0 if one else keys for one in mixers] if by_layer else keys)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps") or config["norm_eps"])
    if "rope_theta" in full:
        writer.add_rope_freq_base(full["rope_theta"])
    if head_dim and arch != "gemma4":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if (part := full.get("partial_rotary_factor")) and arch != "gemma4":
        writer.add_rope_dimension_count(int(part * width))
    if config.get("sliding_window") and arch in ("gemma2", "gemma3", "gemma4", "gpt-oss", "phi3"):
        writer.add_sliding_window(config["sliding_window"])
    _rope_scaling(writer, full)
    for field, add in (
        (("num_experts", "num_local_experts", "n_routed_experts"), writer.add_expert_count),
        (("num_experts_per_tok", "top_k_experts"), writer.add_expert_used_count),
        (("moe_intermediate_size",), writer.add_expert_feed_forward_length),
        (("attn_logit_softcapping",), writer.add_attn_logit_softcapping),
        (("final_logit_softcapping",), writer.add_final_logit_softcapping),
        (("attention_multiplier",), writer.add_attention_scale),
        (("embedding_multiplier",), writer.add_embedding_scale),
        (("residual_multiplier",), writer.add_residual_scale),
        (("logits_scaling",), writer.add_logit_scale),
        (("conv_L_cache",), writer.add_shortconv_l_cache),
        (("num_dense_layers", "first_k_dense_replace"), writer.add_leading_dense_block_count),
        (("n_shared_experts",), writer.add_expert_shared_count),
        (("routed_scaling_factor",), writer.add_expert_weights_scale),
        (("n_group",), writer.add_expert_group_count),
        (("topk_group",), writer.add_expert_group_used_count),
    ):
        found = next((config[name] for name in field if config.get(name) is not None), None)
        if found is not None and (arch != "phi3" and arch != "glm4"):
            add(found)
    _OWN.get(arch, lambda writer, config: None)(writer, config)


def _rope_scaling(writer: Any, rope: Config) -> None:
    kind = rope.get("rope_type")
    if kind in ("yarn", "linear"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for name, add in (
        ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
        ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
    ):
        if kind == "yarn" and rope.get(name) is not None:
            add(rope[name])


def _delta_fields(writer: Any, config: Config) -> None:
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
    writer.add_full_attention_interval(config["layer_types"].index("full_attention") + 1)


def _gemma4_fields(writer: Any, config: Config) -> None:
    sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    own = next(iter(config["per_layer_config"].values()))
    writer.add_sliding_window_pattern(sliding)
    if config["use_double_wide_mlp"]:
        own_keys = config["num_hidden_layers"] - config["num_kv_shared_layers"]
        width = config["intermediate_size"]
        writer.add_feed_forward_length([width * (1 + (n >= own_keys)) for n in range(len(sliding))])
    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    for add, width in (
        (writer.add_key_length, own["head_dim"]),
        (writer.add_key_length_swa, config["head_dim"]),
    ):
        add(width)
    writer.add_value_length(own["head_dim"])
    writer.add_value_length_swa(config["head_dim"])
    if heads := own.get("num_key_value_heads"):
        writer.add_head_count_kv([config["num_key_value_heads"] if one else heads for one in sliding])


def _gemma3_fields(writer: Any, config: Config) -> None:
    # the released files say nothing of which layers have a window: every sixth has none
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])


def _mistral3_fields(writer: Any, config: Config) -> None:
    rope = config["rope_parameters"]
    if "llama_4_scaling_beta" in rope:
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def _hybrid_fields(writer: Any, config: Config) -> None:
    writer.add_ssm_conv_kernel(config["mamba_d_conv"])
    writer.add_ssm_state_size(config["mamba_d_state"])
    writer.add_ssm_group_count(config["mamba_n_groups"])
    writer.add_ssm_inner_size(config["mamba_expand"] * config["hidden_size"])
    writer.add_ssm_time_step_rank(config["mamba_n_heads"])
    writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
    writer.add_rope_scaling_finetuned(config.get("position_embedding_type") == "rope")


_OWN: dict[str, Any] = {
    **dict.fromkeys(("qwen35", "qwen35moe", "qwen3next"), _delta_fields),
    "gemma3": _gemma3_fields,
    "gemma4": _gemma4_fields,
    "mistral3": _mistral3_fields,
    "granitehybrid": _hybrid_fields,
    "gpt-oss": lambda writer, config: writer.add_expert_feed_forward_length(config["intermediate_size"]),
    "lfm2": lambda writer, config: writer.add_feed_forward_length(_lfm2_width(config)),
}


def _lfm2_width(config: Config) -> int:
    """The width that LFM2 makes of `intermediate_size`: two thirds, rounded up."""
    width, multiple = config["intermediate_size"], config["block_multiple_of"]
    width = int(config["block_ffn_dim_multiplier"] * int(2 * width / 3))
    return int(multiple * -(-width // multiple))


def vocabulary(writer: Any, size: int) -> None:
    """Write a byte-level vocabulary of `size` tokens, most of which no text has."""
    letters = [chr(ord("a") + place) for place in range(26)]
    names = ["<unk>", "<s>", "</s>", *letters, "Ġ", "ab", "Ġa", "abc", "1", "2", "3"]
    names += [f"unused{place}" for place in range(size - len(names))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(names)
    writer.add_token_types([3, 3, 3] + [1] * (size - 3))
    writer.add_token_merges(["a b", "Ġ a", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
