"""The rows of architectures whose layers are discovered from the module tree.

A model file of mlx-lm about which nothing particular is known has no row.
"""

from dataclasses import replace

from mlx_adapters.models import (
    corrected_routers,
    corrections,
    interleaved,
    saved_forms,
    saved_weights,
    state_space,
)
from mlx_adapters.models.architectures.row import Architecture, Experts, PeftGaps

__all__ = ["DISCOVERED"]

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

DISCOVERED: dict[str, Architecture] = {
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
        corrections=(corrected_routers.normalise_chosen,),
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
        corrections=(corrected_routers.choose_with_bias,),
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
        corrections=(corrected_routers.weigh_all_experts,),
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
