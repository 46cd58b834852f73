"""The architectures of llama.cpp that are read: each is one `Family` with its names, changes and fields.

llama.cpp's converter gives tensors other names, and some of them other values or another order, than the
checkpoint has. A family says which names of MLX's model the tensors get and how the changes are undone. Most
stacks and parts in a GGUF file are cut as MLX's own modules are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_adapters.convert import gguf_changes as changes
from mlx_adapters.convert import gguf_fields as fields
from mlx_adapters.convert.gguf_changes import Change
from mlx_adapters.convert.gguf_metadata import Metadata

__all__ = ["FAMILIES", "LAYER", "TOP", "Family", "family_of"]

Config = dict[str, Any]

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Part of a block in GGUF -> module of a layer in MLX, in most families."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of llama.cpp.

    `layer` and `top` add to `LAYER` and `TOP`: a key is a part, or a whole name where its ending changes too
    (`ssm_dt.bias`). A value may be several modules, among which the rows are shared out equally, or a module
    with `[0]` or `[1]`, whose rows are joined. `changes` undo what the converter did to a part's values, and
    `joined` the order of a module that was joined. `in_transformers`: transformers reads the tensors right as
    well.
    """

    model_type: str
    model_class: str
    fields: Callable[[Metadata, Config], Config]
    layer: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    top: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)
    joined: Mapping[str, Change] = field(default_factory=dict)
    prefix: str = ""
    in_transformers: bool = False


# The table -------------------------------------------------------------------------------------------------

_TURNED = {"attn_q": changes.halves("num_attention_heads"), "attn_k": changes.halves("num_key_value_heads")}
_SWITCH = {
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
    "ffn_gate_up_exps": ("mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj"),
    "ffn_gate_inp": "mlp.gate",
}


def _moved(old: str, new: str) -> dict[str, str | tuple[str, ...]]:
    """The experts in another module."""
    return {
        name: place.replace(old, new) if isinstance(place, str) else tuple(p.replace(old, new) for p in place)
        for name, place in _SWITCH.items()
    }


_SHARED = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_ROW = {"ffn_gate_inp_shexp": changes.one_row}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SHIFTED = dict.fromkeys(
    ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"),
    changes.minus_one,
) | {"output_norm": changes.minus_one}
_DELTA = {
    "post_attention_norm": "post_attention_layernorm",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_DELTA_35 = _DELTA | {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
}
_DELTA_NEXT = _DELTA | {
    "attn_qkv": "linear_attn.in_proj_qkvz[0]",
    "attn_gate": "linear_attn.in_proj_qkvz[1]",
    "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
}
_UNTILED = {
    "attn_qkv": changes.untiled(keys=True),
    "attn_gate": changes.untiled(),
    "ssm_alpha": changes.untiled(single=True),
    "ssm_beta": changes.untiled(single=True),
    "ssm_a": changes.chained(changes.log_of_negative, changes.untiled(single=True)),
    "ssm_dt": changes.untiled(single=True),
    "ssm_conv1d": changes.chained(changes.untiled(keys=True), changes.convolution),
    "ssm_out": changes.untiled(columns=True),
}
_LFM2 = {
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}
_LFM2_TOP = {"token_embd_norm": "model.embedding_norm", "output_norm": "model.embedding_norm"}
_FFN = {f"ffn_{n}": f"feed_forward.{n}_proj" for n in ("gate", "up", "down")}
_BLOCK_SPARSE = _moved("mlp.switch_mlp", "block_sparse_moe.switch_mlp")
_GRANITE = _BLOCK_SPARSE | {"ffn_gate_inp": "block_sparse_moe.router.layer"}
_HYBRID = _GRANITE | {
    "ffn_gate_shexp": "shared_mlp.input_linear[0]",
    "ffn_up_shexp": "shared_mlp.input_linear[1]",
    "ffn_down_shexp": "shared_mlp.output_linear",
    "ssm_in": "mamba.in_proj",
    "ssm_conv1d": "mamba.conv1d",
    "ssm_dt.bias": "mamba.dt_bias",
    "ssm_a": "mamba.A_log",
    "ssm_d": "mamba.D",
    "ssm_norm": "mamba.norm",
    "ssm_out": "mamba.out_proj",
}
_MAMBA = {
    "ssm_a": changes.chained(changes.flat, changes.log_of_negative),
    "ssm_d": changes.flat,
    "ssm_norm": changes.flat,
    "ssm_conv1d": changes.convolution,
}
_GEMMA4 = _POST_NORMS | {
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_down_exps": "experts.switch_glu.down_proj",
    "ffn_gate_up_exps": ("experts.switch_glu.gate_proj", "experts.switch_glu.up_proj"),
    "ffn_gate_exps": "experts.switch_glu.gate_proj",
    "ffn_up_exps": "experts.switch_glu.up_proj",
}
_GEMMA4_TOP = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}


def _family(model_type: str, model_class: str, fields: Any, **others: Any) -> Family:
    return Family(model_type=model_type, model_class=f"{model_class}ForCausalLM", fields=fields, **others)


FAMILIES: dict[str, Family] = {
    "llama": _family("llama", "Llama", fields.llama, changes=_TURNED, in_transformers=True),
    "mistral3": _family("ministral3", "Ministral3", fields.mistral3, changes=_TURNED),
    "smollm3": _family("smollm3", "SmolLM3", fields.smollm3, changes=_TURNED),
    "qwen2": _family("qwen2", "Qwen2", fields.dense, in_transformers=True),
    "qwen2moe": _family("qwen2_moe", "Qwen2Moe", fields.qwen2_moe, layer=_SWITCH | _SHARED, changes=_ROW),
    "qwen3": _family("qwen3", "Qwen3", fields.dense, in_transformers=True),
    "qwen3moe": _family("qwen3_moe", "Qwen3Moe", fields.qwen3_moe, layer=_SWITCH, in_transformers=True),
    "qwen3next": _family(
        "qwen3_next",
        "Qwen3Next",
        fields.delta_experts,
        layer=_DELTA_NEXT | _SWITCH | _SHARED,
        changes=_ROW | {"ssm_a": changes.log_of_negative, "ssm_conv1d": changes.convolution},
        joined={"linear_attn.in_proj_qkvz": changes.by_key_head},
    ),
    "qwen35": _family(
        "qwen3_5_text",
        "Qwen3_5",
        fields.delta,
        layer=_DELTA_35,
        changes=_UNTILED,
        prefix="language_model.",
        in_transformers=True,
    ),
    "qwen35moe": _family(
        "qwen3_5_moe_text",
        "Qwen3_5Moe",
        fields.delta_experts,
        layer=_DELTA_35 | _SWITCH | _SHARED,
        changes=_UNTILED | _ROW,
        prefix="language_model.",
        in_transformers=True,
    ),
    "gemma": _family("gemma", "Gemma", fields.gemma, changes=_SHIFTED),
    "gemma2": _family(
        "gemma2", "Gemma2", fields.gemma2, layer=_POST_NORMS, changes=_SHIFTED, in_transformers=True
    ),
    "gemma3": _family(
        "gemma3_text", "Gemma3", fields.gemma3, layer=_POST_NORMS, changes=_SHIFTED, in_transformers=True
    ),
    "gemma4": _family("gemma4_text", "Gemma4", fields.gemma4, layer=_GEMMA4, top=_GEMMA4_TOP),
    "gpt-oss": _family(
        "gpt_oss",
        "GptOss",
        fields.gpt_oss,
        layer=_moved("switch_mlp", "experts")
        | {
            "ffn_gate_inp": "mlp.router",
            "attn_sinks.weight": "self_attn.sinks",
            "post_attention_norm": "post_attention_layernorm",
        },
    ),
    "lfm2": _family(
        "lfm2",
        "Lfm2",
        fields.lfm2,
        layer=_LFM2
        | {"ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2"},
        top=_LFM2_TOP,
        changes={"shortconv.conv": changes.convolution},
        in_transformers=True,
    ),
    "lfm2moe": _family(
        "lfm2_moe",
        "Lfm2Moe",
        fields.lfm2_moe,
        layer=_LFM2
        | _FFN
        | _moved("mlp.switch", "feed_forward.switch")
        | {"ffn_gate_inp": "feed_forward.gate"}
        | {"exp_probs_b.bias": "feed_forward.expert_bias"},
        top=_LFM2_TOP,
        changes={"shortconv.conv": changes.convolution},
    ),
    "granite": _family("granite", "Granite", fields.granite, changes=_TURNED),
    "granitemoe": _family("granitemoe", "GraniteMoe", fields.granite_moe, layer=_GRANITE, changes=_TURNED),
    "granitehybrid": _family(
        "granitemoehybrid", "GraniteMoeHybrid", fields.granite_hybrid, layer=_HYBRID, changes=_TURNED | _MAMBA
    ),
    "glm4": _family(
        "glm4",
        "Glm4",
        fields.glm4,
        layer={
            "ffn_up": "mlp.gate_up_proj",
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
    ),
    "glm4moe": _family(
        "glm4_moe",
        "Glm4Moe",
        fields.glm4_moe,
        layer=_SWITCH
        | {name: str(place).replace("shared_expert", "shared_experts") for name, place in _SHARED.items()}
        | {
            "post_attention_norm": "post_attention_layernorm",
            "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
        },
    ),
    "olmo2": _family("olmo2", "Olmo2", fields.olmo2, layer=_AFTER),
    "seed_oss": _family(
        "seed_oss", "SeedOss", fields.seed_oss, layer={"post_attention_norm": "post_attention_layernorm"}
    ),
    "phi3": _family("phi3", "Phi3", fields.phi3, layer=_FUSED, in_transformers=True),
}
"""{architecture as `general.architecture` calls it: how it is read}."""

_MIXTRAL = _family(
    "mixtral",
    "Mixtral",
    fields.mixtral,
    layer=_BLOCK_SPARSE | {"ffn_gate_inp": "block_sparse_moe.gate"},
    changes=_TURNED,
)
_MISTRAL = _family("mistral", "Mistral", fields.mistral, changes=_TURNED)


def family_of(arch: str, found: Metadata) -> Family:
    """The family of an architecture, by what makes one of llama.cpp's two of Hugging Face's."""
    if arch == "llama" and found.whole("expert_count", 0):
        return _MIXTRAL
    if arch == "mistral3" and not found.has("attention.temperature_scale"):  # Mistral Small 3
        return _MISTRAL
    return FAMILIES[arch]
