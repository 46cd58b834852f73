"""What config.json says of each architecture of llama.cpp, from the metadata of a GGUF file.

Each function takes the metadata and what `gguf_metadata.common` made of it, and gives the fields that the
family has besides, or otherwise.
"""

from typing import Any

from mlx_adapters.convert.gguf_metadata import ROPE_FACTORS, Metadata, rotation
from mlx_adapters.errors import CheckpointError, UnsupportedError

Config = dict[str, Any]

_KINDS = {True: "sliding_attention", False: "full_attention"}


def dense(found: Metadata, config: Config) -> Config:
    """Any model without experts."""
    if found.whole("expert_count", 0):
        raise UnsupportedError(f"{found.path}: is a mixture of experts, which is not read of {found.arch!r}")
    return rotation(found)


def _biases(found: Metadata) -> Config:
    tensors = found.container.tensors
    return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}


def llama(found: Metadata, config: Config) -> Config:
    """LLaMA, and what is built alike: biases are where there are tensors of them."""
    return dense(found, config) | _biases(found)


def mixtral(found: Metadata, config: Config) -> Config:
    """Mixtral, which is llama.cpp's llama with experts."""
    return rotation(found) | {
        "num_local_experts": found.whole("expert_count"),
        "num_experts_per_tok": found.whole("expert_used_count"),
        "sliding_window": None,
    }


def smollm3(found: Metadata, config: Config) -> Config:
    """SmolLM3, some of whose layers have no rotations."""
    # llama.cpp has this interval in its code; every fourth layer of the release has no rotations
    turned = [int((layer + 1) % 4 != 0) for layer in range(found.layers)]
    return llama(found, config) | {"no_rope_layers": turned, "no_rope_layer_interval": 4}


def mistral(found: Metadata, config: Config) -> Config:
    """Mistral Small 3, whose layers have no window."""
    return llama(found, config) | {"sliding_window": None}


def mistral3(found: Metadata, config: Config) -> Config:
    """Ministral 3: YaRN, and scores that grow with the position."""
    found.refuse("expert_count", "is of a mixture of experts")
    others = {"llama_4_scaling_beta": found.real("attention.temperature_scale")}
    if found.fields.get(f"{found.arch}.rope.scaling.yarn_log_multiplier") != 0.0:  # or as YaRN has it
        scale = found.real("rope.scaling.yarn_log_multiplier", 1.0)
        others |= {"mscale": scale, "mscale_all_dim": scale}
    return rotation(found, **others)


def _experts(found: Metadata) -> Config:
    return {
        "num_experts": found.whole("expert_count"),
        "num_experts_per_tok": found.whole("expert_used_count"),
        "moe_intermediate_size": found.by_layer("expert_feed_forward_length")[0],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def qwen3_moe(found: Metadata, config: Config) -> Config:
    """Qwen 3 with experts."""
    return rotation(found) | _experts(found) | {"norm_topk_prob": True}


def _shared_expert(found: Metadata) -> Config:
    width = found.shape("blk.0.ffn_up_shexp.weight")
    if not width:
        raise CheckpointError(f"{found.path}: has no tensor 'blk.0.ffn_up_shexp.weight'; download it again")
    return {"shared_expert_intermediate_size": width[0]}


def qwen2_moe(found: Metadata, config: Config) -> Config:
    """Qwen 2 with experts, one of which every token passes."""
    return rotation(found) | _experts(found) | _shared_expert(found) | {"norm_topk_prob": False}


def delta(found: Metadata, config: Config) -> Config:
    """Qwen 3-Next and 3.5: layers of linear attention among those of full attention."""
    keys, values = found.whole("ssm.group_count"), found.whole("ssm.time_step_rank")
    inner = found.whole("ssm.inner_size")
    if not keys or not values or values % keys or inner % values:
        raise found.wrong("ssm.time_step_rank", f"multiple of {keys} that divides {inner}", values)
    if isinstance(found.fields.get(f"{found.arch}.attention.recurrent_layers"), list):
        linear = found.flags("attention.recurrent_layers", 0)
    else:
        linear = found.flags("full_attention_interval", 4)
    kinds = {True: "linear_attention", False: "full_attention"}
    return rotation(found) | {
        "layer_types": [kinds[one] for one in linear],
        "linear_conv_kernel_dim": found.whole("ssm.conv_kernel"),
        "linear_key_head_dim": found.whole("ssm.state_size"),
        "linear_value_head_dim": inner // values,
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
    }


def delta_experts(found: Metadata, config: Config) -> Config:
    """Qwen 3-Next and 3.5 with experts."""
    return delta(found, config) | _experts(found) | _shared_expert(found) | {"norm_topk_prob": True}


def _soft_caps(found: Metadata, *names: str) -> Config:
    """Soft-caps of the logits, of the attention's and of the output's."""
    keys = {"attn": "attn_logit_softcapping", "final": "final_logit_softcapping"}
    return {keys[n]: found.real(keys[n]) if found.has(keys[n]) else None for n in names}


def gemma(found: Metadata, config: Config) -> Config:
    """Gemma."""
    return rotation(found) | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _windows(found: Metadata, period: int) -> Config:
    window = found.whole("attention.sliding_window", 0)
    sliding = found.flags("attention.sliding_window_pattern", period) if window else [False] * found.layers
    return {"sliding_window": window or 4096, "layer_types": [_KINDS[one] for one in sliding]}


def _scalar(found: Metadata, config: Config, layers: int) -> Config:
    """What the scores are divided by: a head's width, or width / heads in the largest model, of `layers`."""
    largest = found.layers == layers
    scalar = config["hidden_size"] // config["num_attention_heads"] if largest else found.head_dim
    return {"query_pre_attn_scalar": scalar}


def gemma2(found: Metadata, config: Config) -> Config:
    """Gemma 2: windows in every other layer, and soft-caps."""
    made = gemma(found, config) | _windows(found, 2) | _scalar(found, config, 46)
    return made | _soft_caps(found, "attn", "final")


def gemma3(found: Metadata, config: Config) -> Config:
    """Gemma 3: rotations of two kinds, by the kind of layer."""
    made = gemma(found, config) | _windows(found, 6) | _scalar(found, config, 62)
    theta, scaling = found.real("rope.freq_base", 1e6), made.pop("rope_scaling")
    local = {"rope_type": "default", "rope_theta": found.real("rope.freq_base_swa", 10000.0)}
    full = {"rope_type": "default"} | (scaling or {}) | {"rope_theta": theta}
    both = {"sliding_attention": local, "full_attention": full}
    made |= {"rope_parameters": both, "rope_theta": theta, "rope_local_base_freq": local["rope_theta"]}
    return made | {"rope_scaling": scaling} | _soft_caps(found, "final")


def gemma4(found: Metadata, config: Config) -> Config:
    """Gemma 4: sizes by the kind of layer, layers that use keys of others, inputs by layer, experts."""
    windows = _windows(found, 6)
    sliding = [kind == _KINDS[True] for kind in windows["layer_types"]]
    full = next((layer for layer, one in enumerate(sliding) if not one), None)
    heads, width = found.by_layer("attention.head_count_kv"), found.by_layer("feed_forward_length")
    local, whole = found.whole("attention.key_length_swa"), found.whole("attention.key_length")
    extra = found.whole("embedding_length_per_layer_input", 0)
    shared = full is not None and not found.shape(f"blk.{full}.attn_v.weight")
    made: Config = windows | {
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": local,
        "global_head_dim": whole,
        "num_key_value_heads": max(
            (n for n, one in zip(heads, sliding, strict=True) if one), default=heads[0]
        ),
        "num_global_key_value_heads": heads[full] if shared and full is not None else None,
        "attention_k_eq_v": shared,
        "num_kv_shared_layers": found.whole("attention.shared_kv_layers", 0),
        "hidden_size_per_layer_input": extra,
        "intermediate_size": min(width),
        "use_double_wide_mlp": max(width) == 2 * min(width),
        "rope_parameters": _gemma4_rotation(found, whole),
    }
    if extra:
        rows = found.shape("per_layer_token_embd.weight")
        made["vocab_size_per_layer_input"] = rows[0] if rows else config["vocab_size"]
    if experts := found.whole("expert_count", 0):
        made |= {
            "enable_moe_block": True,
            "num_experts": experts,
            "top_k_experts": found.whole("expert_used_count"),
            "moe_intermediate_size": found.by_layer("expert_feed_forward_length")[0],
        }
    return made | _soft_caps(found, "final")


def _gemma4_rotation(found: Metadata, width: int) -> Config:
    """Full layers rotate the dimensions whose factor is 1, sliding layers all."""
    local = found.whole("attention.key_length_swa")
    if found.whole("rope.dimension_count_swa", local) != local:
        raise UnsupportedError(f"{found.path}: its sliding layers rotate a part of a head, which is not read")
    rotated = width // 2
    if ROPE_FACTORS[0] in found.container.tensors:
        factors = found.factors(ROPE_FACTORS[0], width // 2)
        rotated = int((factors == 1).sum())
        if not (factors[:rotated] == 1).all() or not (factors[rotated:] >= 1e20).all():
            raise UnsupportedError(f"{found.path}: '{ROPE_FACTORS[0]}' is not the rope of Gemma 4")
    full = {"rope_type": "proportional", "partial_rotary_factor": 2 * rotated / width}
    return {
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": found.real("rope.freq_base_swa", 10000.0),
        },
        "full_attention": full | {"rope_theta": found.real("rope.freq_base", 1e6)},
    }


def gpt_oss(found: Metadata, config: Config) -> Config:
    """gpt-oss."""
    # GGUF has no field for `truncate`, which is off in both released models
    return (
        rotation(found, truncate=False)
        | _windows(found, 2)
        | {
            "num_local_experts": found.whole("expert_count"),
            "num_experts_per_tok": found.whole("expert_used_count"),
            "intermediate_size": found.by_layer("expert_feed_forward_length")[0],
            "attention_bias": True,
        }
    )


def lfm2(found: Metadata, config: Config) -> Config:
    """LFM2: convolutions where a layer has no heads of keys."""
    found.refuse("attention.sliding_window", "gives its attention a window")
    conv = [count == 0 for count in found.by_layer("attention.head_count_kv")]
    return rotation(found) | {
        "layer_types": ["conv" if one else "full_attention" for one in conv],
        "conv_L_cache": found.whole("shortconv.l_cache"),
        "conv_bias": "blk.0.shortconv.conv.bias" in found.container.tensors,
        "norm_eps": config["rms_norm_eps"],
        "block_auto_adjust_ff_dim": False,
        "block_dim": config["hidden_size"],
        "block_ff_dim": config["intermediate_size"],
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
    }


def lfm2_moe(found: Metadata, config: Config) -> Config:
    """LFM2 with experts."""
    dense = found.whole("leading_dense_block_count", 0)
    experts = _experts(found) | {"num_dense_layers": dense, "norm_topk_prob": True}
    biased = f"blk.{dense}.exp_probs_b.bias" in found.container.tensors
    return lfm2(found, config) | experts | {"use_expert_bias": biased, "routed_scaling_factor": 1.0}


def _multipliers(found: Metadata) -> Config:
    scales = {
        "attention_multiplier": ("attention.scale", found.head_dim**-0.5),
        "embedding_multiplier": ("embedding_scale", 1.0),
        "residual_multiplier": ("residual_scale", 1.0),
        "logits_scaling": ("logit_scale", 1.0),
    }
    return {name: found.real(key, usual) for name, (key, usual) in scales.items()}


def granite(found: Metadata, config: Config) -> Config:
    """Granite 3, and Granite 4 without Mamba."""
    _refuse_no_rotation(found)
    return llama(found, config) | _multipliers(found)


def _refuse_no_rotation(found: Metadata) -> None:
    # llama.cpp's switch for the rotations of Granite
    if found.fields.get(f"{found.arch}.rope.scaling.finetuned") is False:
        raise UnsupportedError(f"{found.path}: is a Granite model without rotations, which is not read")


def _granite_experts(found: Metadata) -> Config:
    return {
        "num_local_experts": found.whole("expert_count", 0),
        "num_experts_per_tok": found.whole("expert_used_count", 0),
    }


def granite_moe(found: Metadata, config: Config) -> Config:
    """Granite 3 with experts."""
    found.refuse("expert_shared_feed_forward_length", "is of a shared expert")
    _refuse_no_rotation(found)
    biases = {"attention_bias": _biases(found)["attention_bias"]}
    return rotation(found) | _multipliers(found) | _granite_experts(found) | biases


def granite_hybrid(found: Metadata, config: Config) -> Config:
    """Granite 4."""
    inner, heads = found.whole("ssm.inner_size"), found.whole("ssm.time_step_rank")
    if not heads or inner % heads or inner % config["hidden_size"]:
        raise found.wrong("ssm.inner_size", "multiple of the heads and of the width", inner)
    attends = [count > 0 for count in found.by_layer("attention.head_count_kv")]
    turned = found.fields.get(f"{found.arch}.rope.scaling.finetuned", True)
    conv = next((layer for layer, one in enumerate(attends) if not one), 0)
    shared = found.whole("expert_shared_feed_forward_length", 0) or config["intermediate_size"]
    return (
        rotation(found)
        | _multipliers(found)
        | _granite_experts(found)
        | {
            "layer_types": ["full_attention" if one else "linear_attention" for one in attends],
            "position_embedding_type": "rope" if turned else "nope",
            "attention_bias": any(".attn_q.bias" in name for name in found.container.tensors),
            "shared_intermediate_size": shared,
            "mamba_n_heads": heads,
            "mamba_d_head": inner // heads,
            "mamba_d_state": found.whole("ssm.state_size"),
            "mamba_n_groups": found.whole("ssm.group_count"),
            "mamba_d_conv": found.whole("ssm.conv_kernel"),
            "mamba_expand": inner // config["hidden_size"],
            "mamba_conv_bias": f"blk.{conv}.ssm_conv1d.bias" in found.container.tensors,
            "mamba_proj_bias": False,
        }
    )


def glm4(found: Metadata, config: Config) -> Config:
    """GLM-4-0414."""
    sections = found.fields.get(f"{found.arch}.rope.dimension_sections")
    if isinstance(sections, list) and any(sections):
        raise UnsupportedError(f"{found.path}: is the language model of GLM-4V, whose rotations are not read")
    bias = "blk.0.attn_q.bias" in found.container.tensors
    return dense(found, config) | {"attention_bias": bias}


def glm4_moe(found: Metadata, config: Config) -> Config:
    """GLM 4.5 to 4.7: experts in all layers but the first."""
    tensors = found.container.tensors
    experts = _experts(found)
    return rotation(found) | {
        "n_routed_experts": experts["num_experts"],
        "num_experts_per_tok": experts["num_experts_per_tok"],
        "moe_intermediate_size": experts["moe_intermediate_size"],
        "n_shared_experts": found.whole("expert_shared_count", 0),
        "first_k_dense_replace": found.whole("leading_dense_block_count", 0),
        "routed_scaling_factor": found.real("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(found.fields.get(f"{found.arch}.expert_weights_norm", True)),
        "n_group": found.whole("expert_group_count", 1),
        "topk_group": found.whole("expert_group_used_count", 1),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
    }


def olmo2(found: Metadata, config: Config) -> Config:
    """OLMo 2, whose norms come after the sublayers; OLMo 3 has windows besides."""
    found.refuse("attention.sliding_window", "is of OLMo 3")
    return dense(found, config)


def seed_oss(found: Metadata, config: Config) -> Config:
    """Seed-OSS."""
    biases = _biases(found) | {"attention_out_bias": "blk.0.attn_output.bias" in found.container.tensors}
    return dense(found, config) | biases


def phi3(found: Metadata, config: Config) -> Config:
    """Phi-3 and Phi-4."""
    original = found.whole("rope.scaling.original_context_length", config["max_position_embeddings"])
    return dense(found, config) | {
        "sliding_window": found.whole("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": original,
    }
