"""The table of configuration fields: made by one command, and what it calls wrong is refused by name."""

import re

import pytest

from mlx_adapters.errors import UnsupportedError
from mlx_adapters.models import config as model_config
from mlx_adapters.models import fields

torch = pytest.importorskip("torch")

from field_scan import bases, changes, outcome, scan  # noqa: E402
from field_table import entry  # noqa: E402

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
            with pytest.raises(UnsupportedError) as raised:
                model_config.normalise(config)
            assert re.search(case.label.partition(".")[0], str(raised.value))
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize("model_type", [name for name in bases() if fields.measured(name)])
def test_what_is_refused_is_wrong(model_type: str) -> None:
    for base in bases()[model_type]:
        try:
            model_config.normalise(base.written({}))
        except UnsupportedError:
            assert outcome(base) != "right"
