"""The table that `mlx-adapters models` prints is what trying gives."""

import re
from typing import Any

import pytest
import support_table
import trials

from mlx_adapters import methods
from mlx_adapters.errors import UnsupportedError
from mlx_adapters.models import supported
from mlx_adapters.models.supported import architectures

# Of each kind: windows, experts, a state space, and what no method works on, or what cannot run.
SAMPLE = ("gemma3_text", "gpt2", "llama", "mamba", "mixtral", "olmo", "phi", "prism_hadamard_qwen35", "rwkv7")


def without_numbers(entry: Any) -> Any:
    """An entry whose reasons say how large a difference is: that depends on the machine."""
    if isinstance(entry, dict):
        return {key: without_numbers(value) for key, value in entry.items()}
    return re.sub(r"\d[\d.e+-]*", "N", entry) if isinstance(entry, str) else entry


def shipped(name: str) -> Any:
    return without_numbers(supported._table()["architectures"][name])


@pytest.mark.parametrize("name", SAMPLE)
def test_the_table_says_what_trying_gives(name: str) -> None:
    assert shipped(name) == without_numbers(support_table.entry(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in support_table.names() if name not in SAMPLE])
def test_so_it_does_for_every_other_architecture(name: str) -> None:
    assert shipped(name) == without_numbers(support_table.entry(name))


def test_the_table_has_every_architecture_and_every_other_name_of_one() -> None:
    table = supported._table()
    assert architectures() == support_table.names()
    assert table["files"] == support_table.files()
    assert set(table["files"].values()) <= set(architectures())


def test_the_table_says_what_the_families_tests_compare() -> None:
    assert supported._table()["compared"] == support_table.compared()
    assert supported.supported("rwkv7", ["lora"])["compared"] is None  # only tried


def test_an_architecture_under_another_name_is_found_and_a_wrong_name_is_told() -> None:
    found = supported.supported("kimi_k2", ["lora"])
    assert found == supported.supported("deepseek_v3", ["lora"]) | {
        "architecture": "kimi_k2",
        "compared": None,
    }
    with pytest.raises(UnsupportedError, match=r"'lama'\. Did you mean 'llama'"):
        supported.supported("lama", ["lora"])


@pytest.mark.parametrize("method", methods.names())
def test_what_a_method_stands_on_is_found_on_a_model(method: str) -> None:
    assert methods.about(method)["stands_on"] == trials.stands_on(method)
