"""Configs are read as transformers reads them, or refused with the field's name; never another function."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from samples import sample_config
from tiny import ARCHS, make_tiny

from mlx_adapters.errors import CheckpointError, UnsupportedError
from mlx_adapters.models import config as model_config

torch = pytest.importorskip("torch")

LENGTH = 150


def rope(kind: str = "default", **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 777.0} | fields}


VARIANTS = [
    *((arch, {}) for arch in ARCHS),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4, "head_dim": 16}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", rope("linear", factor=2.0)),
    (
        "llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    ("mistral", {"sliding_window": 16}),
    ("gemma2", {"sliding_window": 16}),
    ("gemma3_text", {"num_hidden_layers": 6}),
    ("gemma3_text", {"num_hidden_layers": 6, "sliding_window": 16}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("gpt2", {"activation_function": "gelu", "n_inner": 40, "scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gptj", {"n_inner": 48}),
    ("gpt_neox", {"hidden_act": "gelu"}),
    ("gpt_neox", {"intermediate_size": 64, "attention_bias": False, "use_parallel_residual": False}),
    ("phi", {"hidden_act": "relu"}),
    # the "gemma", "starcoder2" and "phi3" families: mlx-lm's activation or window is not transformers'
    ("gemma", {}),
    ("starcoder2", {"sliding_window": 16}),
    ("phi3", {"sliding_window": 16}),
]


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def built(folder: Path, config: dict[str, Any]) -> Any:
    from mlx_lm.utils import load_model

    return load_model(folder, model_config=config, get_model_classes=model_config.classes)[0]


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(4, 64, (2, LENGTH))


def reference(folder: Path) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(tokens())).logits.numpy()


@pytest.mark.parametrize(("arch", "fields"), VARIANTS, ids=lambda value: str(value)[:60])
def test_logits_equal_transformers(arch: str, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = make_tiny(arch, tmp_path, **fields)
    theirs = reference(folder)
    model = built(folder, model_config.normalise(read(folder)))
    bound = 1e-5 + 1e-5 * np.abs(theirs).max()
    assert np.abs(np.array(model(mx.array(tokens()))) - theirs).max() <= bound

    # in pieces through the KV cache: a window must hold there too
    from mlx_lm.models.cache import make_prompt_cache

    cache, ids = make_prompt_cache(model), mx.array(tokens())
    parts = [model(ids[:, :100], cache=cache), model(ids[:, 100:149], cache=cache)]
    parts.append(model(ids[:, 149:], cache=cache))
    assert np.abs(np.concatenate([np.array(part) for part in parts], axis=1) - theirs).max() <= bound


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "gemma2", "phi"])
def test_the_comparison_notices_a_lost_theta(arch: str, tmp_path: Path) -> None:
    folder = make_tiny(arch, tmp_path)
    config = model_config.normalise(read(folder)) | rope(rope_theta=10000.0)
    assert np.abs(np.array(built(folder, config)(mx.array(tokens()))) - reference(folder)).max() > 1e-2


@pytest.mark.parametrize("arch", ARCHS)
def test_both_rope_styles_are_written_and_twice_is_once(arch: str, tmp_path: Path) -> None:
    once = model_config.normalise(read(make_tiny(arch, tmp_path)))
    assert model_config.normalise(once) == once
    written = model_config.to_transformers(once)
    assert written["dtype"] == written["torch_dtype"] == "float32"
    if arch not in ("gpt2", "gptj"):
        assert once["rope_theta"] == once["rope_parameters"]["rope_theta"] == 777.0
        assert once["rope_scaling"] is None
    if arch == "gpt_neox":
        assert (once["rotary_emb_base"], once["rotary_pct"]) == (777.0, 0.5)


def test_an_old_config_reads_as_the_new_one(tmp_path: Path) -> None:
    new = read(make_tiny("llama", tmp_path, **rope("linear", factor=2.0)))
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "num_key_value_heads")}
    old |= {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "num_key_value_heads": 2}
    old.pop("tie_word_embeddings")
    assert model_config.normalise(old) == model_config.normalise(new)


def _constructed(config: dict[str, Any]) -> Any:
    normalised = model_config.normalise(config)
    model, args = model_config.classes(normalised)
    return model(args.from_dict(normalised))


@pytest.mark.parametrize(
    ("arch", "fields", "culprit"),
    [
        ("llama", rope("dynamic", factor=4.0), "rope_scaling"),
        ("llama", rope(partial_rotary_factor=0.5), "partial_rotary_factor"),
        ("llama", {"hidden_act": "laplace"}, "hidden_act"),
        ("llama", {"model_file": "model.py"}, "model_file"),
        ("llama", {"model_type": "nonesuch", "auto_map": {"AutoModel": "x.Y"}}, "model_type"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ("qwen2", {"head_dim": 16}, "head_dim"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gptj", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
    ],
)
def test_what_mlx_lm_would_get_wrong_is_refused(
    arch: str, fields: dict[str, Any], culprit: str, tmp_path: Path
) -> None:
    config = read(make_tiny(arch, tmp_path)) | fields
    with pytest.raises(UnsupportedError, match=culprit) as raised:
        _constructed(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "gpt_oss"},
        {"model_type": "phimoe", "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 4}},
    ],
    ids=lambda fields: fields["model_type"],
)
def test_biases_that_a_model_always_has_are_no_field_unread(fields: dict[str, Any]) -> None:
    """Its ModelArgs has no attention_bias, its attention has."""
    model = _constructed(sample_config(fields["model_type"]) | fields | {"attention_bias": True})
    assert all("bias" in layer.self_attn.q_proj for layer in model.layers)


def test_a_model_file_that_ends_the_program_is_an_error() -> None:
    """mlx-lm's olmo calls sys.exit where a package of its own is missing."""
    with pytest.raises(UnsupportedError, match=r"'olmo', whose file in mlx-lm .*pip install ai2-olmo"):
        model_config.normalise({"model_type": "olmo", "hidden_size": 32})


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"rope_theta": 5.0}, "rope_theta"),
        ({"rope_theta": "many"}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"hidden_size": ...}, "hidden_size"),
    ],
)
def test_a_broken_config_names_the_field(change: dict[str, Any], culprit: str, tmp_path: Path) -> None:
    config = read(make_tiny("llama", tmp_path)) | change
    config = {name: value for name, value in config.items() if value is not ...}
    with pytest.raises(CheckpointError, match=culprit):
        model_config.normalise(config)


def test_gemma3_has_a_theta_for_each_type_of_layer() -> None:
    old = {
        "model_type": "gemma3_text",
        "rope_theta": 777.0,
        "rope_local_base_freq": 55.0,
        "rope_scaling": None,
    }
    new = model_config.normalise(old)
    thetas = {kind: values["rope_theta"] for kind, values in new["rope_parameters"].items()}
    assert thetas == {"full_attention": 777.0, "sliding_attention": 55.0}
    only_new = {name: new[name] for name in ("model_type", "rope_parameters")}
    assert model_config.normalise(only_new) == new == model_config.normalise(new)
