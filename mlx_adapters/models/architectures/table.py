"""The rows.

Those with layers come first: they are compared with PyTorch method by method. The others hold what is known
of an architecture whose layers are discovered; a model file of mlx-lm without anything particular has no row.
"""

from dataclasses import replace

from mlx_adapters.models import (
    corrections,
    interleaved,
    routing,
    saved_forms,
    saved_weights,
    state_space,
)
from mlx_adapters.models.architectures.row import (
    AdapterHub,
    Architecture,
    Experts,
    PeftGaps,
)

__all__ = ["ARCHITECTURES", "architecture", "with_layers"]

_UNTIED = {"tie_word_embeddings": False}
_EXPERTS = Experts("mlp.switch_mlp")
_GEMMA_EXPERTS = Experts("experts.switch_glu", there="experts")
_GRANITE_EXPERTS = Experts(
    "block_sparse_moe.switch_mlp",
    there="block_sparse_moe.experts",
    router=("router.layer", "router"),
)
_MIXTRAL_EXPERTS = Experts(  # checkpoints still say block_sparse_moe, transformers' modules no longer
    "block_sparse_moe.switch_mlp",
    gate="w1",
    up="w3",
    down="w2",
    router=("block_sparse_moe.gate", "mlp.gate"),
)
_MIXTURE = PeftGaps(routed=True, stacked=True)

_LLAMA = Architecture(
    attn=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    lora=("q_proj", "v_proj"),
    parallel=("q_proj", "k_proj", "v_proj"),
    ia3=("k_proj", "v_proj", "down_proj"),
    attn_out="o_proj",
    mlp_out="down_proj",
    pre_attn="input_layernorm",
    pre_mlp="post_attention_layernorm",
    checked=True,
)
_LLAMA_2 = replace(_LLAMA, defaults=_UNTIED, adapterhub=AdapterHub())

_GEMMA = replace(_LLAMA, scaled_embedding=True)

_BLOOM = Architecture(
    attn=("query_key_value", "self_attention.dense"),
    mlp=("dense_h_to_4h", "dense_4h_to_h"),
    lora=("query_key_value",),
    parallel=("query_key_value",),
    ia3=("query_key_value", "dense_4h_to_h"),
    attn_out="self_attention.dense",
    mlp_out="dense_4h_to_h",
    pre_attn="input_layernorm",
    pre_mlp="post_attention_layernorm",
    rename=(("model.", "transformer."),),
)
_BLOOM_HUB = AdapterHub(
    embeddings="word_embeddings",
    layers="h",
    attention="self_attention",
    fused="query_key_value",
    out="dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": replace(_LLAMA_2, llm_adapters=True),
    "mistral": _LLAMA_2,
    "qwen2": _LLAMA_2,
    "qwen3": _LLAMA_2,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "gemma": replace(
        _GEMMA,
        adapterhub=AdapterHub(),
    ),
    "gemma2": replace(
        _GEMMA,
        pre_mlp="pre_feedforward_layernorm",
        defaults={
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 256,
        },
        corrections=(corrections.mask_by_row,),
        adapterhub=AdapterHub(pre_mlp="pre_feedforward_layernorm"),
    ),
    "gemma3_text": replace(
        _GEMMA,
        pre_mlp="pre_feedforward_layernorm",
        forms=(saved_forms.sliding_pattern,),
        corrections=(corrections.scale_embeddings_exactly,),
    ),
    "olmo2": replace(  # its norms come after the sublayers
        _LLAMA, pre_attn=None, pre_mlp=None, defaults=_UNTIED
    ),
    "phi3": replace(
        _LLAMA_2,
        attn=("qkv_proj", "o_proj"),
        mlp=("gate_up_proj", "down_proj"),
        lora=("qkv_proj",),
        parallel=("qkv_proj",),
        ia3=("qkv_proj", "down_proj"),
        adapterhub=AdapterHub(fused="qkv_proj", up="mlp.gate_up_proj"),
    ),
    "glm": replace(
        _LLAMA,
        mlp=("gate_up_proj", "down_proj"),
        defaults=_UNTIED,
        rotary_part=0.5,
        rotates_part=True,
        corrections=(corrections.rotate_part,),
        adapterhub=AdapterHub(up="mlp.gate_up_proj"),
    ),
    "phi": Architecture(
        attn=("q_proj", "k_proj", "v_proj", "dense"),
        mlp=("fc1", "fc2"),
        lora=("q_proj", "v_proj"),
        parallel=("q_proj", "k_proj", "v_proj"),
        ia3=("q_proj", "v_proj", "fc2"),
        attn_out="dense",
        mlp_out="fc2",
        pre_attn="input_layernorm",  # one norm serves both sublayers
        checked=True,
        rotary_part=0.5,
        adapterhub=AdapterHub(out="dense", up="mlp.fc1", down="mlp.fc2", pre_mlp=None, residual="none"),
    ),
    "gpt2": Architecture(
        attn=("attn.c_attn", "attn.c_proj"),
        mlp=("mlp.c_fc", "mlp.c_proj"),
        lora=("c_attn",),
        parallel=("c_attn",),
        ia3=("c_attn", "mlp.c_proj"),
        attn_out="attn.c_proj",
        mlp_out="mlp.c_proj",
        pre_attn="ln_1",
        pre_mlp="ln_2",
        rename=(("model.", "transformer."),),
        conv1d=True,
        rename_weights=corrections.gpt2_names,
        checked=True,
        renamed={"n_positions": "n_ctx"},
        ungated=("c_fc", "c_proj"),
        widths=("n_inner", "n_embd"),
        corrections=(corrections.scale_attention,),
        adapterhub=AdapterHub(known=True),
    ),
    "gptj": Architecture(
        attn=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("fc_in", "fc_out"),
        lora=("q_proj", "v_proj"),
        parallel=("q_proj", "k_proj", "v_proj"),
        ia3=("q_proj", "v_proj", "fc_out"),
        attn_out="out_proj",
        mlp_out="fc_out",
        pre_attn="ln_1",  # one norm serves both sublayers
        rename=(("model.", "transformer."),),
        checked=True,
        ungated=("fc_in", "fc_out"),
        widths=("n_inner", "n_embd"),
        adapterhub=AdapterHub(known=True, residual="with attention"),
        llm_adapters=True,
    ),
    "gpt_neox": replace(
        _BLOOM,
        attn=("query_key_value", "attention.dense"),
        attn_out="attention.dense",
        rename=(
            ("model.h.", "gpt_neox.layers."),
            ("model.embed_out", "embed_out"),
            ("model.", "gpt_neox."),
        ),
        checked=True,
        rotary_part=0.25,
        rotary_names=("rotary_emb_base", "rotary_pct"),
        ungated=("dense_h_to_4h", "dense_4h_to_h"),
        widths=("intermediate_size", "hidden_size"),
        corrections=(corrections.drop_attention_biases,),
        adapterhub=replace(_BLOOM_HUB, embeddings="embed_in", layers="layers", attention="attention"),
    ),
    "bloom": replace(
        _BLOOM,
        checked=True,
        own=True,
        renamed={"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
        adapterhub=_BLOOM_HUB,
        llm_adapters=True,
    ),
    "chatglm": replace(
        _BLOOM,
        own=True,
        renamed={"num_hidden_layers": "num_layers", "padded_vocab_size": "vocab_size"},
        variants=(("position_encoding_2d", "chatglm6b"),),
        fixed={
            "original_rope": (None, True),
            "pre_seq_len": (None,),
            "quantization_bit": (None, 0),
        },
        refuse=corrections.refuse_chatglm2_ratio,
        llm_adapters=True,
    ),
    "chatglm6b": replace(
        _BLOOM,
        attn=("query_key_value", "attention.dense"),
        attn_out="attention.dense",
        own=True,
        called="chatglm",
        renamed={"num_hidden_layers": "num_layers"},
        fixed={"pre_seq_len": (None,), "quantization_bit": (None, 0)},
        llm_adapters=True,
    ),
    "opt": Architecture(
        attn=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("fc1", "fc2"),
        lora=("q_proj", "v_proj"),
        parallel=("q_proj", "k_proj", "v_proj"),
        ia3=("q_proj", "k_proj", "fc2"),
        attn_out="out_proj",
        mlp_out="fc2",
        pre_attn="self_attn_layer_norm",
        pre_mlp="final_layer_norm",
        checked=True,
        own=True,
        adapterhub=AdapterHub(
            embeddings="decoder.embed_tokens",
            layers="decoder.layers",
            out="out_proj",
            up="fc1",
            down="fc2",
            pre_attention="self_attn_layer_norm",
            pre_mlp="final_layer_norm",
        ),
        llm_adapters=True,
    ),
    "gpt_neo": Architecture(
        attn=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("mlp.c_fc", "mlp.c_proj"),
        lora=("q_proj", "v_proj"),
        parallel=("q_proj", "k_proj", "v_proj"),
        ia3=("q_proj", "v_proj", "c_proj"),
        attn_out="out_proj",
        mlp_out="mlp.c_proj",
        pre_attn="ln_1",
        pre_mlp="ln_2",
        rename=(("model.", "transformer."),),
        checked=True,
        own=True,
        renamed={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
        adapterhub=AdapterHub(
            embeddings="wte",
            layers="h",
            attention="attn.attention",
            out="out_proj",
            up="mlp.c_fc",
            down="mlp.c_proj",
            pre_attention="ln_1",
            pre_mlp="ln_2",
        ),
        llm_adapters=True,
    ),
    # Mixtures whose experts have names in the checkpoint that are known
    "deepseek_v2": Architecture(
        as_built=corrections.scale_by_one, experts=_EXPERTS, checked=True, peft=_MIXTURE
    ),
    "dots1": Architecture(experts=Experts("mlp.experts"), checked=True, peft=_MIXTURE),
    "glm4_moe": Architecture(experts=_EXPERTS, checked=True, peft=_MIXTURE),
    "mixtral": Architecture(
        experts=_MIXTRAL_EXPERTS,
        checked=True,
        defaults=_UNTIED,
        peft=_MIXTURE,
    ),
    "olmoe": Architecture(
        experts=_EXPERTS,
        checked=True,
        renamed={"num_local_experts": "num_experts"},
        corrections=(corrections.clip_projections,),
        peft=_MIXTURE,
    ),
    "qwen2_moe": Architecture(
        experts=_EXPERTS,
        checked=True,
        renamed={"num_local_experts": "num_experts"},
        corrections=(routing.normalise_chosen,),
        peft=PeftGaps(routed=True),
    ),
    "qwen3_moe": Architecture(
        experts=_EXPERTS, checked=True, renamed={"num_local_experts": "num_experts"}, peft=_MIXTURE
    ),
    # Fields of the configuration that mlx-lm reads otherwise
    "cohere": Architecture(checked=True),
    "gpt_bigcode": Architecture(
        forms=(saved_forms.four_times_wide,),
    ),
    "gpt_oss": Architecture(
        experts=Experts("mlp.experts", interleaved=True),
        rename_weights=interleaved.stacks,
        peft=PeftGaps(routed=True),
    ),
    "olmo": Architecture(fixed={"clip_qkv": (None,)}),
    "phi3small": Architecture(corrections=(corrections.mask_blocks_causally,)),
    "plamo3": Architecture(corrections=(corrections.shorten_window,)),
    "stablelm": Architecture(checked=True, rotary_part=0.25),
    "starcoder2": Architecture(
        checked=True,
    ),
    # Written for transformers, and nothing particular
    **dict.fromkeys(
        ("ernie4_5", "glm4", "helium", "hunyuan_v1_dense", "nemotron", "seed_oss"),
        Architecture(checked=True),
    ),
    **dict.fromkeys(("qwen3_5", "step3p5"), Architecture(shifted_norms=True)),
    "qwen3_5_moe": Architecture(shifted_norms=True, rename_weights=saved_weights.joined_experts),
    # Configurations that transformers saves otherwise than mlx-lm reads them
    "apertus": Architecture(forms=(saved_forms.apertus_constants,)),
    "cohere2": Architecture(checked=True, forms=(saved_forms.sliding_pattern,)),
    "exaone4": Architecture(
        forms=(saved_forms.exaone_window_letters,), corrections=(corrections.forget_absent_kinds,)
    ),
    "gemma3": Architecture(scaled_embedding=True),
    "gemma3n": Architecture(scaled_embedding=True, corrections=(saved_weights.without_lent_keys,)),
    "gemma3n_text": Architecture(
        file="gemma3n",
        scaled_embedding=True,
        rename_weights=saved_weights.gemma3n_alone,
        corrections=(saved_weights.without_lent_keys,),
    ),
    "gemma4": Architecture(scaled_embedding=True, experts=_GEMMA_EXPERTS, peft=_MIXTURE),
    "gemma4_text": Architecture(
        scaled_embedding=True,
        experts=_GEMMA_EXPERTS,
        forms=(saved_forms.gemma4_full_layers,),
        peft=_MIXTURE,
    ),
    "lfm2": Architecture(forms=(saved_forms.lfm2_width,)),
    "olmo_hybrid": Architecture(
        rename_weights=saved_weights.renamed(
            {
                "attention_layer_norm": "input_layernorm",
                "feedforward_layer_norm": "post_attention_layernorm",
            }
        )
    ),
    "olmo3": Architecture(scales_full_only=True),
    "qwen3_5_text": Architecture(file="qwen3_5", shifted_norms=True, forms=(saved_forms.linear_interval,)),
    "qwen3_5_moe_text": Architecture(
        file="qwen3_5_moe",
        shifted_norms=True,
        forms=(saved_forms.linear_interval,),
        rename_weights=saved_weights.joined_experts,
    ),
    # Layers that PEFT does not open
    **dict.fromkeys(("bailing_hybrid", "exaone", "nanochat"), Architecture(peft=PeftGaps(absent=".*"))),
    "dbrx": Architecture(peft=PeftGaps(absent=r"ffn\..*")),
    # PEFT takes the two sides of its stacks for one another
    **dict.fromkeys(("llama4", "llama4_text"), Architecture(peft=PeftGaps(absent="experts"))),
    "ernie4_5_moe": Architecture(
        kept=((r"(.*\.mlp)\.(?:moe_statics\.)?e_score_correction_bias", r"\1.e_score_correction_bias"),),
        corrections=(routing.choose_with_bias,),
        peft=_MIXTURE,
    ),
    "granitemoe": Architecture(experts=_GRANITE_EXPERTS, peft=PeftGaps(routed=True)),
    "granitemoehybrid": Architecture(
        experts=_GRANITE_EXPERTS,
        forms=(
            saved_forms.layer_names({"linear_attention": "mamba", "full_attention": "attention"}),
            saved_forms.rotations_as_stated,
        ),
        peft=PeftGaps(routed=True),
    ),
    "jamba": Architecture(
        as_built=corrections.count_expert_layers,
        corrections=(routing.weigh_all_experts,),
        # transformers reads the weight of dt_proj and passes PEFT's layer by
        peft=PeftGaps(absent=r"mamba\.dt_proj", routed=True),
    ),
    "kimi_linear": Architecture(peft=PeftGaps(absent=r"self_attn\.f_[ab]_proj", routed=True)),
    "laguna": Architecture(peft=PeftGaps(absent=r"mlp\.gate\.proj|shared_expert\.\w+")),
    "lfm2_moe": Architecture(peft=replace(_MIXTURE, absent=r"feed_forward\.(?:gate|up|down)_proj")),
    "mellum": Architecture(peft=PeftGaps(routed=True)),
    "minimax": Architecture(
        experts=_MIXTRAL_EXPERTS,
        forms=(saved_forms.refuse_lightning_attention,),
        peft=replace(_MIXTURE, absent=r"self_attn\.[qk]_norm"),
    ),
    "minimax_m2": Architecture(
        experts=_MIXTRAL_EXPERTS,
        forms=(saved_forms.minimax_m2_rotations,),
        rotates_part=True,
        peft=_MIXTURE,
    ),
    "nemotron_h": Architecture(
        experts=Experts("mixer.switch_mlp", there="mixer.experts", gated=False),
        peft=PeftGaps(routed=True, state_space=True),
    ),
    "phimoe": Architecture(
        experts=replace(_MIXTRAL_EXPERTS, router=("block_sparse_moe.gate", "mlp.router")),
        peft=PeftGaps(routed=True),
    ),
    "qwen3_next": Architecture(shifted_norms=True, forms=(saved_forms.linear_interval,), peft=_MIXTURE),
    "exaone_moe": Architecture(forms=(saved_forms.sparse_layers,), peft=PeftGaps(stacked=True)),
    **dict.fromkeys(
        (*("afmoe", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "longcat_flash"),),
        Architecture(peft=PeftGaps(stacked=True)),
    ),
    "glm4_moe_lite": Architecture(
        corrections=(corrections.norm_factors_exactly,), peft=PeftGaps(stacked=True)
    ),
    "falcon_h1": Architecture(
        fold_weights=state_space.fold_multipliers,
        corrections=(state_space.group_gated_norms,),
        peft=PeftGaps(state_space=True),
    ),
    "mamba2": Architecture(
        forms=(saved_forms.expanded_width,),
        corrections=(state_space.group_gated_norms,),
        peft=PeftGaps(state_space=True),
    ),
    **dict.fromkeys(("falcon_mamba", "mamba"), Architecture(peft=PeftGaps(state_space=True))),
}

_UNKNOWN = Architecture()


def architecture(model_type: str) -> Architecture:
    """What is known of `model_type` without its model; for the layers ask `discover.architecture_of`."""
    return ARCHITECTURES.get(model_type, _UNKNOWN)


def with_layers() -> list[str]:
    """The architectures whose rows name their layers."""
    return [name for name, row in ARCHITECTURES.items() if row.attn]
