"""config.json as transformers 5 saves it and as models were published: read here, and opened there again."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, WRAPPERS, model_type_of

from mlx_adapters.errors import AdaptersError, CheckpointError, UnsupportedError
from mlx_adapters.models import config as model_config
from mlx_adapters.models import saved_forms

INFINITE = {"__float__": "Infinity"}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
# Other words for the same: transformers computes alike with either.
SAME: dict[str, tuple[Any, Any]] = {
    "position_embedding_type": (None, "nope"),
    "sliding_window_pattern": (4, "LLLG"),  # layer_types says it
    "n_inner": (None, 256),  # four times n_embd
}
GEMMA4 = FAMILIES["gemma4_text"] | {"model_type": "gemma4_text"}


def opened(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What transformers reads of a config.json, as it saves it itself."""
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(saved_forms.encoded(config)), encoding="utf-8")
    AutoConfig.from_pretrained(folder).save_pretrained(folder / "again")
    again: dict[str, Any] = json.loads((folder / "again" / "config.json").read_text())
    return again


def differing(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The fields of `one` that `other` has otherwise; a vision tower is left out of what is written."""
    wrong = {}
    for name, value in one.items():
        if isinstance(value, dict) and name != "vision_config":
            wrong |= differing(value, other[name])
        elif value != other.get(name) and name not in ("vision_config", "dtype", "transformers_version"):
            wrong[name] = (value, other.get(name))
    return {name: values for name, values in wrong.items() if SAME.get(name) != values}


@pytest.mark.parametrize("name", [*FAMILIES, *WRAPPERS])
def test_what_is_written_is_to_transformers_what_it_saved(name: str, tmp_path: Path) -> None:
    """Every family: saved by transformers, read here, written, and opened there with equal fields."""
    from transformers import AutoConfig

    fields = deepcopy(FAMILIES.get(name) or WRAPPERS[name])
    AutoConfig.for_model(model_type_of(name), **fields).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    try:
        written = model_config.to_transformers(saved)
    except UnsupportedError as error:
        pytest.skip(f"refused: {error}")
    assert model_config.to_transformers(written) == written
    assert differing(saved, opened(written, tmp_path)) == {}


def test_olmo_3_with_yarn_as_it_was_published_opens_again(tmp_path: Path) -> None:
    kept = {n: v for n, v in FAMILIES["olmo3"].items() if n != "rope_parameters"}
    published = kept | {
        "model_type": "olmo3",
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "rope_scaling": YARN,
    }
    written = model_config.to_transformers(published)
    assert written["rope_scaling"]["factor"] == YARN["factor"]
    (tmp_path / "before").mkdir()
    before, after = opened(published, tmp_path / "before"), opened(written, tmp_path)
    assert after["rope_parameters"]["sliding_attention"] == {"rope_theta": 500000.0, "rope_type": "default"}
    assert differing(before["rope_parameters"], after["rope_parameters"]) == {}


def test_gemma_4_as_it_was_published_opens_again(tmp_path: Path) -> None:
    text = {name: value for name, value in GEMMA4.items() if name != "per_layer_config"}
    text |= {"global_head_dim": 64, "num_global_key_value_heads": None, "vocab_size_per_layer_input": 262144}
    published = {"model_type": "gemma4", "text_config": text, "tie_word_embeddings": True}
    found = opened(model_config.to_transformers(published), tmp_path)["text_config"]
    assert found["per_layer_config"] == {"1": {"head_dim": 64}, "3": {"head_dim": 64}}
    assert found["vocab_size_per_layer_input"] == 262144
    assert found["rope_parameters"] == text["rope_parameters"]


def test_a_number_of_layers_is_still_bounded_also_inside_a_wrapper() -> None:
    deep = {"model_type": "gemma4", "text_config": GEMMA4 | {"num_hidden_layers": 2**31}}
    with pytest.raises(CheckpointError, match=r"num_hidden_layers.*at most 1000"):
        model_config.normalise(deep)


def test_numbers_that_json_has_not_are_read_and_written() -> None:
    config = {"time_step_limit": [0.0, INFINITE], "inner": {"low": {"__float__": "-Infinity"}}, "n": 1.5}
    found = saved_forms.decoded(config)
    assert found["time_step_limit"] == [0.0, float("inf")]
    assert saved_forms.encoded(found) == config
    assert saved_forms.decoded({"__float__": "12"}) == {"__float__": "12"}


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("qwen3_next", {"layer_types": ["full_attention", "linear_attention"] * 2}, "irregular places"),
        ("gemma4_text", {"per_layer_config": {"1": {"head_dim": 64}}}, "different sizes"),
        (
            "gemma4_text",
            {"per_layer_config": {n: {"intermediate_size": 32} for n in "13"}},
            "different sizes",
        ),
        (
            "gemma4_text",
            {"per_layer_config": {n: {"num_key_value_heads": 1} for n in "13"}},
            "attention_k_eq_v",
        ),
    ],
)
def test_what_the_model_file_cannot_build_is_refused(name: str, change: dict[str, Any], words: str) -> None:
    config = FAMILIES[name] | {"model_type": name, "rms_norm_eps": 1e-6} | change
    with pytest.raises(AdaptersError, match=words):
        model_config.normalise(config)


@pytest.mark.parametrize(
    ("kinds", "letters"), [("SSSF" * 2, "LLLG"), ("SFF", "LGG"), ("SFSFF", "LGLGG"), ("FFFF", "G")]
)
def test_letters_of_windows_repeat_to_the_kinds_of_layers(kinds: str, letters: str) -> None:
    types = [{"S": "sliding_attention", "F": "full_attention"}[kind] for kind in kinds]
    found = saved_forms.exaone_window_letters({"layer_types": types, "sliding_window": 4})
    assert found["sliding_window_pattern"] == letters
