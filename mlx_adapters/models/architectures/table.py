"""The rows that name an architecture's layers, compared with PyTorch method by method; and all rows by name.

Those of architectures whose layers are discovered stand in `discovered.py`.
"""

from dataclasses import replace

from mlx_adapters.models import (
    corrections,
    saved_forms,
)
from mlx_adapters.models.architectures.discovered import DISCOVERED
from mlx_adapters.models.architectures.row import (
    AdapterHub,
    Architecture,
)

__all__ = ["ARCHITECTURES", "architecture", "with_layers"]

_UNTIED = {"tie_word_embeddings": False}

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

_WITH_LAYERS: dict[str, Architecture] = {
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
        corrections=(corrections.cap_in_blocks,),
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
}

ARCHITECTURES: dict[str, Architecture] = {**_WITH_LAYERS, **DISCOVERED}
_UNKNOWN = Architecture()


def architecture(model_type: str) -> Architecture:
    """What is known of `model_type` without its model; for the layers ask `discover.architecture_of`."""
    return ARCHITECTURES.get(model_type, _UNKNOWN)


def with_layers() -> list[str]:
    """The architectures whose rows name their layers."""
    return [name for name, row in ARCHITECTURES.items() if row.attn]
