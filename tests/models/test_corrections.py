"""Fields that mlx-lm's files do not read act here as in transformers: whole, by caches, in padded batches.

Each case changes one field of a tiny model whose logits it must move in transformers; ours must be theirs.
"""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from families import TEXT, make_family, opened

from mlx_adapters.errors import UnsupportedError
from mlx_adapters.files.weights import read_weights
from mlx_adapters.models import fields as fields_table
from mlx_adapters.models import limits, load
from mlx_adapters.models.build import build

torch = pytest.importorskip("torch")

Fields = dict[str, Any]

_PAD = 4  # tokens before the second text in a batch


def rope(kind: str, **fields: Any) -> Fields:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 777.0} | fields}


def types(letters: str) -> Fields:
    names = {"s": "sliding_attention", "f": "full_attention"}
    return {"layer_types": [names[letter] for letter in letters], "num_hidden_layers": len(letters)}


# truncate and attention_factor are fields that mlx-lm reads nowhere
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64, truncate=False, attention_factor=1.3)
HALF = {"rope_parameters": YARN["rope_parameters"] | {"partial_rotary_factor": 0.5}}
LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
WINDOW = {"sliding_window": 6}
GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}


def longrope(pairs: int, original: int) -> Fields:
    short, long = ([1.0 + step * pair for pair in range(pairs)] for step in (0.1, 0.9))
    return rope(
        "longrope",
        factor=4.0,
        original_max_position_embeddings=original,
        short_factor=short,
        long_factor=long,
    )


FAST: list[tuple[str, Fields]] = [
    ("qwen3_moe", YARN),
    ("glm4_moe", HALF),
    ("llama", LLAMA3),
    ("llama", longrope(16, 8)),
    ("llama", longrope(16, 64)),
    ("ministral3", WINDOW),
    ("qwen3_moe", WINDOW | {"use_sliding_window": True}),
    ("qwen2_moe", WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    ("exaone4", types("ffsf")),
    ("gemma2", {"hidden_activation": "silu"}),
    ("mixtral", {"hidden_act": "relu"}),
    ("phi3", {"hidden_act": "gelu"}),
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("olmoe", {"clip_qkv": 0.3}),
    ("falcon_h1", {"key_multiplier": 0.5}),
    ("jamba", {"num_experts_per_tok": 1}),
    ("glm4_moe", {"num_experts_per_tok": 1}),
]
BROAD: list[tuple[str, Fields]] = [
    *(
        (name, YARN)
        for name in (
            *("llama", "qwen2", "seed_oss", "starcoder2", "granite", "granitemoe", "ernie4_5", "olmo2"),
            *("olmoe", "hunyuan_v1_dense", "falcon_h1", "lfm2_moe", "gemma2", "exaone4", "smollm3"),
        )
    ),
    *((name, HALF) for name in ("glm", "glm4", "phi", "stablelm", "gpt_neox")),
    ("hunyuan_v1_dense", rope("dynamic", alpha=10.0, factor=1.0)),
    ("phi3", longrope(8, 8)),
    ("mixtral", WINDOW),
    ("phimoe", WINDOW),
    ("starcoder2", {"sliding_window": 3}),
    ("smollm3", WINDOW | {"use_sliding_window": True, "num_hidden_layers": 4}),
    ("gemma3_text", types("sfsfsf")),
    ("olmo3", types("fsfs")),
    *(
        (name, {"hidden_act": "mish"})
        for name in (
            *("llama", "gemma", "qwen3", "qwen3_moe", "glm4", "glm4_moe", "cohere2", "olmoe", "starcoder2"),
            *("stablelm", "granitemoe", "phi", "gpt_neox", "ernie4_5_moe", "phimoe"),
        )
    ),
    ("starcoder2", {"hidden_act": "gelu"}),
    ("gpt_bigcode", {"activation_function": "gelu"}),
    ("nemotron_h", {"mlp_hidden_act": "silu"}),
    ("nemotron_h", {"time_step_min": 0.9}),
    ("mamba2", {"time_step_limit": [0.1, 0.2]}),
    ("falcon_h1", {"mamba_rms_norm": True, "mamba_n_groups": 2}),
    ("falcon_h1", {"attention_in_multiplier": 0.5}),
    ("deepseek_v3", GROUPS),
    ("glm4_moe", GROUPS),
]


def logits(network: Any, text: list[list[int]]) -> np.ndarray:
    with torch.no_grad():
        return network(torch.tensor(text)).logits.float().numpy()


def ours(folder: Path) -> Any:
    # without the table of fields: it is made by trying the corrections, and may be older than they are
    with mock.patch.object(fields_table, "check"):
        return build(load.read_config(folder), read_weights(folder), str(folder))


def pieces(model: Any) -> np.ndarray:
    """The logits of the texts, read in three pieces through the model's caches."""
    from mlx_lm.models.cache import make_prompt_cache

    cache, ids = make_prompt_cache(model), mx.array(TEXT)
    parts = (ids[:, :9], ids[:, 9:13], ids[:, 13:])
    return np.concatenate([np.array(model(part, cache=cache)) for part in parts], axis=1)


def padded(model: Any) -> np.ndarray | None:
    """The logits of the second text without its first tokens, in a batch with the first one; None where a
    cache is no cache of keys and values, or positions are learned."""
    from mlx_lm.models import cache

    if limits.positions(model) is not None:
        return None
    batch = []
    for layer in cache.make_prompt_cache(model):
        if type(layer) is cache.KVCache:
            batch.append(cache.BatchKVCache([0, _PAD]))
        elif type(layer) is cache.RotatingKVCache:
            batch.append(cache.BatchRotatingKVCache(layer.max_size, [0, _PAD]))
        else:
            return None
    ids = mx.array([TEXT[0], [0] * _PAD + TEXT[1][_PAD:]])
    parts = [np.array(model(part, cache=batch)) for part in (ids[:, :9], ids[:, 9:13], ids[:, 13:])]
    return np.concatenate(parts, axis=1)[1:, _PAD:]


def check(name: str, fields: Fields, folder: Path) -> None:
    layers: Fields = {
        key: value for key, value in fields.items() if key in ("num_hidden_layers", "n_routed_experts")
    }
    if "layer_types" in fields:
        layers["layer_types"] = ["full_attention"] * fields["num_hidden_layers"]
    usual = logits(opened(make_family(name, folder / "usual", **layers)), TEXT)
    changed = make_family(name, folder, **fields)
    network = opened(changed)
    theirs = logits(network, TEXT)
    bound = 1e-5 + 1e-5 * np.abs(theirs).max()
    assert np.abs(theirs - usual).max() > 10 * bound, "the field does not move the logits"
    model = ours(changed)
    assert np.abs(np.array(model(mx.array(TEXT))) - theirs).max() <= bound
    assert np.abs(pieces(model) - theirs).max() <= bound
    if (batched := padded(model)) is not None:
        alone = logits(network, [TEXT[1][_PAD:]])
        assert np.abs(batched - alone).max() <= bound


@pytest.mark.parametrize(("name", "fields"), FAST, ids=lambda value: str(value)[:60])
def test_a_field_acts(name: str, fields: Fields, tmp_path: Path) -> None:
    check(name, fields, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields"), BROAD, ids=lambda value: str(value)[:60])
def test_a_field_acts_broadly(name: str, fields: Fields, tmp_path: Path) -> None:
    check(name, fields, tmp_path)


@pytest.mark.parametrize(
    ("name", "fields", "culprit"),
    [
        ("gemma3_text", types("ssffsf"), "layer_types"),
        ("falcon_h1", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"hidden_act": "laplace"}, "hidden_act"),
        ("llama", rope("dynamic", factor=4.0), "rope_scaling"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_corrected_is_refused(name: str, fields: Fields, culprit: str, tmp_path: Path) -> None:
    folder = make_family(name, tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(UnsupportedError, match=culprit) as raised:
        ours(folder)
    assert "\n" not in str(raised.value)


def test_the_table_of_what_transformers_reads_is_what_it_reads_now() -> None:
    from reference_table import scanned

    from mlx_adapters.models.reference import TABLE

    found, stated = scanned(), json.loads(TABLE.read_text())
    if found["transformers"] != stated["transformers"]:
        pytest.skip(f"the table is of transformers {stated['transformers']}")
    assert found == stated
