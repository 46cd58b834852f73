"""A tiny model of every architecture, with random weights: what the table of support is measured on.

A configuration is `_COMMON`, what the architecture's own row in `_OWN` says otherwise, and for wrappers
around a text model (`_WRAPPED`) that model's configuration in `text_config`. Fields that a model does not
have are ignored when it is built. Hybrids get at least one block of each kind.
"""

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

import mlx_adapters.models
from mlx_adapters.errors import AdaptersError, UnsupportedError, unknown
from mlx_adapters.models import config
from mlx_adapters.models.architectures.table import architecture

__all__ = ["IDS", "architectures", "file_of", "known", "sample", "sample_config"]

Fields = dict[str, Any]

_LAYERS = 2
_ROPE = {"type": "default", "rope_type": "default", "rope_theta": 10000.0}
_BY_KIND = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"

_COMMON: Fields = {
    name: value
    for names, value in (
        ("vocab_size num_vocab padded_vocab_size vocab_size_per_layer_input", 64),
        ("hidden_size dim d_model model_dim n_embd n_embed dim_model_base moe_hidden_size", 32),
        ("num_hidden_layers num_layers n_layer n_layers num_transformer_layers", _LAYERS),
        ("num_attention_heads num_heads n_head n_heads mamba_num_heads mamba_n_heads", 4),
        ("num_key_value_heads num_kv_heads n_kv_heads num_attention_groups", 2),
        ("head_dim kv_channels hidden_size_per_head v_head_dim global_head_dim", 8),
        ("qk_rope_head_dim qk_nope_head_dim", 8),
        ("kv_lora_rank q_lora_rank o_lora_rank", 16),
        ("intermediate_size ffn_hidden_size hidden_dim n_inner ffn_dim intermediate_size_mlp", 64),
        ("dense_intermediate_size ff_intermediate_size", 64),
        ("attention_bias mlp_bias use_bias use_qkv_bias conv_bias use_conv_bias mamba_proj_bias", False),
        ("mla_scale_q_lora mla_scale_kv_lora tie_word_embeddings", False),
        ("qk_norm post_norm use_qk_norm qk_layernorm norm_topk_prob", True),
        ("rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon layernorm_epsilon", 1e-5),
        ("post_norm_eps", 1e-5),
        ("logits_scaling embedding_multiplier logit_scale residual_multiplier scale_depth scale_emb", 1.0),
        ("output_multiplier", 1.0),
        ("attention_multiplier", 0.35),
        ("final_logit_softcapping logits_soft_cap", 30.0),
        # positions
        ("max_position_embeddings n_positions n_ctx block_size model_max_length", 256),
        # shorter than the texts: what a layer does beyond its window is tried too
        ("sliding_window sliding_window_size attention_window_size window_size", 4),
        ("sliding_window_pattern", 2),
        ("layer_types", [_FULL] * _LAYERS),
        ("rope_theta swa_rope_theta rotary_emb_base rope_local_base_freq", 10000.0),
        ("partial_rotary_factor rotary_pct", 1.0),
        ("rotary_dim", 4),
        ("rope_parameters", _ROPE),
        ("rope_scaling", None),
        # experts
        ("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
        ("num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k", 2),
        ("n_shared_experts num_shared_experts num_shared_expert n_group topk_group zero_expert_num", 1),
        ("moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size", 32),
        ("shared_expert_intermediate_size share_expert_dim", 32),
        ("first_k_dense_replace num_dense_layers moe_layer_freq decoder_sparse_step", 1),
        ("mlp_only_layers", []),
        ("routed_scaling_factor", 1.0),
        ("topk_method", "noaux_tc"),
        ("scoring_func", "sigmoid"),
        ("zero_expert_type", "identity"),
        # state-space, convolution and linear-attention blocks
        ("state_size ssm_state_size mamba_d_state mamba_head_dim mamba_d_head", 16),
        ("conv_kernel mamba_d_conv linear_conv_kernel_dim conv1d_width conv_L_cache time_step_rank", 4),
        ("linear_num_key_heads linear_num_value_heads mamba_expand", 2),
        ("linear_key_head_dim linear_value_head_dim", 32),
        ("mamba_d_ssm", 64),
        ("n_groups mamba_n_groups group_norm_size", 1),
        ("time_step_limit", (0.001, 100.0)),
        ("full_attention_interval layer_group_size", 2),
        # sparse attention
        ("index_head_dim", 8),
        ("index_topk", 4),
        ("index_n_heads", 2),
    )
    for name in names.split()
}

_KDA = {"kda_layers": [1], "num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4}
_SCALED = _ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 256}
_YARN = _ROPE | {"type": "yarn", "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
# the last two of four layers attend to the keys of the first two
_SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": [_SLIDING, _FULL] * 2}

_PACKED = [f"model.layers.{i}.mlp.{name}_proj" for i in range(_LAYERS) for name in ("gate", "up", "down")] + [
    *(f"model.layers.0.linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj")),
    *(f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"),
]

_OWN: dict[str, Fields] = {
    "afm7": {"num_kv_reuse_layers": 1},
    "baichuan_m1": {"sliding_window_layers": [1], "conv_window": 2},
    # the contexts of the texts end there
    "chatglm6b": {"bos_token_id": 8, "gmask_token_id": 20, "mask_token_id": 21},
    "cohere2": {"layer_types": [_SLIDING, _FULL]},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": _YARN, "topk_method": "greedy"},
    "exaone4": {"sliding_window_pattern": "LG", "layer_types": [_SLIDING, _FULL]},
    "exaone_moe": {"is_moe_layer": [False, True], "layer_types": [_SLIDING, _FULL]},
    "gemma3_text": {"layer_types": [_SLIDING, _FULL]},
    "gemma3n": {
        **_SHARED,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 4,
    },
    "gemma4_text": {
        **_SHARED,
        "hidden_size_per_layer_input": 8,
        "rope_parameters": _BY_KIND,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_oss": {"layer_types": [_SLIDING, _FULL]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1.0},
    },
    "jamba": dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1)
    | dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2),
    "kimi_k3": {"linear_attn_config": _KDA, "hidden_act": "situ", "attn_res_block_size": 2},
    "kimi_linear": {"linear_attn_config": _KDA},
    "lfm2": {
        "block_dim": 32,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", _FULL],
    },
    "lfm2_moe": {"use_expert_bias": True, "layer_types": ["conv", _FULL]},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "lille-130m": {"n_embd": 96},  # its MLP is a multiple of 256 wide
    "llama4": {
        "num_hidden_layers": 4,
        "attention_chunk_size": 4,
        "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 1,
    },
    "longcat_flash": {"attention_method": "MLA", "mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "longcat_flash_ngram": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "mellum": {"rope_parameters": _BY_KIND, "layer_types": [_SLIDING, _FULL]},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "minicpm3": {"rope_scaling": {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}},
    "ministral3": {"rope_parameters": _SCALED, "layer_types": [_SLIDING, _FULL]},
    "minimax_m3_vl": {"mlp_layer_types": ["dense", "sparse"], "index_block_size": 2, "index_topk_blocks": 1},
    "mistral4": {"rope_parameters": _SCALED},
    "muse_spark": {
        "layer_rope_theta": [0, 10000.0],
        "layer_types": [_FULL, _SLIDING],
        "num_shared_experts": 0,
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}},
            {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
        ]
    },
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "E"]},
    "olmo3": {"layer_types": [_SLIDING, _FULL]},
    "olmo_hybrid": {"linear_allow_neg_eigval": True, "layer_types": [_LINEAR, _FULL]},
    "openelm": {
        "ffn_dim_divisor": 8,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 2.0],
    },
    # it names the unused ones of its own 100352 tokens
    "phi3small": {"vocab_size": 100352, "dense_attention_every_n_layers": 2, "gegelu_limit": 20.0},
    "plamo": {"n_shared_head": 2},
    "plamo3": {"layer_types": [_SLIDING, _FULL]},
    "prism_hadamard_qwen35": {
        **dict.fromkeys(("hidden_size", "intermediate_size"), 128),
        **dict.fromkeys(("head_dim", "linear_value_head_dim"), 64),
        "num_attention_heads": 2,
        "num_experts": 0,
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [{"path": path, "embedding": False, "dtype": "float16", "block": 0} for path in _PACKED],
    },
    "qwen3_5": {"num_experts": 0},
    "qwen3_next": {"layer_types": [_LINEAR, _FULL]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv7": dict.fromkeys(
        ("a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim"), 8
    ),
    "spark2_5": {"rope_parameters": _BY_KIND, "layer_types": [_SLIDING, _FULL]},
}

# wrapper -> the text model whose configuration its `text_config` is
_WRAPPED = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "llama4": "llama4",
    "minimax_m3_vl": "minimax_m3_vl",
    "mistral3": "llama",
    "muse_spark": "muse_spark",
    "pixtral": "llama",
    "prism_hadamard_qwen35": "prism_hadamard_qwen35",
    "qwen3_vl_moe": "qwen3_moe",
}


def architectures() -> list[str]:
    """Every architecture that has a model file, in mlx-lm or here."""
    import mlx_lm.models

    folders = (*mlx_lm.models.__path__, *mlx_adapters.models.__path__)
    files = [file for folder in folders for file in Path(folder).glob("*.py")]
    # reading the text runs nobody's code: importing one of the files ends the process
    texts = {file.stem: file.read_text(encoding="utf-8") for file in files}
    return sorted(n for n, text in texts.items() if "\nclass ModelArgs" in text and "\nclass Model(" in text)


def file_of(model_type: str) -> str:
    """The name of the model file that serves `model_type`: mlx-lm reads mistral as llama, for one."""
    from mlx_lm.utils import MODEL_REMAPPING

    return architecture(model_type).file or str(MODEL_REMAPPING.get(model_type, model_type))


def known(model_type: str) -> None:
    """Raise UnsupportedError that lists the known ones if `model_type` is no architecture."""
    if file_of(model_type) not in architectures():
        raise UnsupportedError(unknown("architecture", model_type, architectures()))


def sample_config(model_type: str) -> Fields:
    """The tiny configuration of `model_type`."""
    name = file_of(model_type)
    fields = _fields(name) | {"model_type": model_type}
    if inner := _WRAPPED.get(name):
        fields["text_config"] = _fields(inner)
    return fields


def _fields(name: str) -> Fields:
    # mlx-lm's classes keep and change what they are given
    return copy.deepcopy(_COMMON | _OWN.get(name, {}) | {"model_type": name})


IDS = mx.array([[4, 5, 6, 7, 8, 9, 10, 11], [11, 10, 9, 8, 7, 6, 5, 4]])
"""The texts that samples are run on."""


def sample(model_type: str) -> nn.Module:
    """A tiny random model of `model_type`, the same each time, that runs.

    Raises UnsupportedError with the reason where it cannot be built or run here.
    """
    known(model_type)
    fields = sample_config(model_type)
    mx.random.seed(0)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model, args = config.classes(fields)
            network = model(args.from_dict(fields))
            # arrays that start at zero would hide what stands behind them
            network.update(tree_map(_shaken, network.parameters()))
            network.eval()
            mx.eval(network(IDS))
    except AdaptersError:
        raise
    except Exception as error:  # a model file may raise anything
        text = " ".join(str(error).split())
        raise UnsupportedError(f"{model_type}: cannot run here ({text or type(error).__name__})") from None
    return network


def _shaken(array: mx.array) -> mx.array:
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    return array + (0.05 * mx.random.normal(array.shape)).astype(array.dtype)
