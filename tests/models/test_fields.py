"""The table of configuration fields: made by one command, and what it calls wrong is refused by name."""

import contextlib
import json
import re
from typing import Any

import pytest

from mlx_adapters.errors import CheckpointError, UnsupportedError
from mlx_adapters.models import config as model_config
from mlx_adapters.models import fields

torch = pytest.importorskip("torch")

from field_scan import bases, changes, outcome, scan  # noqa: E402
from field_table import entry  # noqa: E402
from transformers import AutoConfig  # noqa: E402

QUICK = "gpt_neo"
TEN = (
    *(
        "llama",
        "qwen3_moe",
        "gemma3_text",
        "gpt_oss",
        "deepseek_v3",
        "granitemoehybrid",
        "lfm2",
        "ernie4_5_moe",
    ),
    *("falcon_h1", "qwen3_5"),
)
MODELS = fields.table()["models"]


def compared(model_type: str) -> None:
    """A scan of now says what the table says. Whether a field moves the logits enough to count as moving them
    may depend on the machine; whether ours are the same may not."""
    fresh, shipped = entry(scan(model_type)), MODELS[model_type]
    right = [set(f"{e.get('alike', '')} {e.get('idle', '')}".split()) for e in (fresh, shipped)]
    assert right[0] == right[1]
    for part in ("base", "fields", "defaults", "aliases"):
        assert fresh.get(part) == shipped.get(part), part


def test_the_table_is_what_a_scan_gives() -> None:
    compared(QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TEN)
def test_the_table_is_what_a_scan_of_ten_gives(model_type: str) -> None:
    compared(model_type)


@pytest.mark.parametrize("model_type", [name for name in bases() if fields.measured(name)])
def test_what_would_be_silently_different_is_refused_by_name(model_type: str) -> None:
    tried = MODELS[model_type].get("fields", {})
    for base in bases()[model_type]:
        for case in changes(base):
            if case.drop or case.value not in fields.silent(tried.get(case.label, {})):
                continue
            try:
                config = base.written(case.fields)
            except Exception:  # transformers refuses it with this base
                continue
            text = config.get("text_config", config)
            if text.get(case.label, case.value) != case.value:  # transformers writes another value
                continue
            with pytest.raises(UnsupportedError) as raised:
                model_config.normalise(config)
            assert re.search(case.label.partition(".")[0], str(raised.value))
            assert "\n" not in str(raised.value)


# transformers' own defaults, which are a released model's, that are refused: each is no released checkpoint's
UNRELEASED = {"lfm2": "layer_types", "phimoe": "attention_bias", "minicpm3": "rope_type"}


@pytest.mark.parametrize("model_type", [name for name in bases() if fields.measured(name)])
def test_the_defaults_are_not_refused(model_type: str) -> None:
    config = AutoConfig.for_model(model_type).to_json_string(use_diff=False)
    if model_type in UNRELEASED:
        with pytest.raises(UnsupportedError, match=UNRELEASED[model_type]):
            model_config.normalise(json.loads(config))
        return
    with contextlib.suppress(CheckpointError):  # what a released configuration has and the class has not
        model_config.normalise(json.loads(config))


@pytest.mark.parametrize("model_type", [name for name in bases() if fields.measured(name)])
def test_what_is_refused_is_wrong(model_type: str) -> None:
    for base in bases()[model_type]:
        try:
            model_config.normalise(base.written({}))
        except UnsupportedError:
            assert outcome(base) != "right"


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("gpt_oss", {"attention_bias": True}),
        ("phimoe", {"attention_bias": True}),
        ("deepseek_v2", {"head_dim": 64}),
        ("deepseek_v3", {"head_dim": 64}),
        ("glm4_moe", {"num_experts_per_tok": 8}),
        ("llama", {"partial_rotary_factor": 0.5}),  # transformers' llama does not read it
    ],
)
def test_what_is_right_is_not_refused(model_type: str, change: dict[str, Any]) -> None:
    fields.check(bases()[model_type][0].written(change) | change)


def test_a_model_that_was_not_compared_is_told() -> None:
    assert fields.remark("llama") is None
    assert fields.remark("chatglm") is None  # transformers does not have it
    (other, *_) = fields.table()["not compared"]
    assert f"{other} was not compared" in str(fields.remark(other))
