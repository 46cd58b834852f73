"""What is known of an architecture stands in its row: nothing else in the package names a model_type."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import samples
from mlx_lm.utils import MODEL_REMAPPING

from mlx_adapters.models.architectures.table import ARCHITECTURES, architecture, with_layers
from mlx_adapters.models.discover import architecture_of

ROOT = Path(__file__).parents[2]
ROWS = {f"mlx_adapters/models/architectures/{name}.py" for name in ("discovered", "table")}
# Besides the rows and the files of the models that mlx-lm lacks.
EXCEPTIONS = {
    "convert/gguf_families.py": "the architectures of llama.cpp, and which model each is here",
    "convert/gguf_pretokenizers.py": "the rules for cutting texts, as llama.cpp calls them",
    "convert/gguf_tokenizer.py": "the kinds of tokenizers in a GGUF file, as llama.cpp calls them",
    "convert/load_adapter.py": "is handed over with an adapter, and runs where this package is not installed",
}
NAMES = {*ARCHITECTURES, *samples.architectures(), *MODEL_REMAPPING}


def literals(text: str) -> Iterator[str]:
    """Every string of a source text that is an architecture's name and no docstring."""
    tree = ast.parse(text)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in NAMES and id(node) not in docs:
            yield str(node.value)


def naming() -> dict[str, list[str]]:
    """{file: the architectures that it names} of the package's source."""
    files = [file for part in ("mlx_adapters", "convert", "cli") for file in (ROOT / part).rglob("*.py")]
    texts = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}
    found = {file: sorted(set(literals(text))) for file, text in texts.items()}
    own = {f"mlx_adapters/models/{name}.py" for name, row in ARCHITECTURES.items() if row.own}
    return {file: names for file, names in found.items() if names and file not in own | ROWS}


def test_only_rows_name_an_architecture() -> None:
    assert {file: names for file, names in naming().items() if file not in EXCEPTIONS} == {}


def test_every_exception_is_still_needed() -> None:
    assert EXCEPTIONS.keys() <= naming().keys()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('if config["model_type"] == "gptj":\n    pass', ["gptj"]),
        ('"""llama"""\nx = ("phi", "other")', ["phi"]),
        ('def f():\n    "qwen2"\n    return f"{x}llama3"', []),
    ],
)
def test_a_name_is_seen(text: str, names: list[str]) -> None:
    assert list(literals(text)) == names


def test_the_models_that_mlx_lm_lacks_have_a_file() -> None:
    own = {name for name, row in ARCHITECTURES.items() if row.own}
    assert own
    assert all((ROOT / "mlx_adapters" / "models" / f"{name}.py").is_file() for name in own)


def test_every_row_is_of_an_architecture_that_can_be_loaded() -> None:
    assert {samples.file_of(name) for name in ARCHITECTURES} <= set(samples.architectures())


@pytest.mark.parametrize("name", with_layers())
def test_paths_come_back_from_the_checkpoint_as_they_went(name: str) -> None:
    network, row = samples.sample(name), architecture(name)
    paths = [path for path, _ in network.named_modules() if path]
    assert [row.from_hf(row.to_hf(path)) for path in paths] == paths


def test_a_row_without_layers_keeps_what_it_says_when_they_are_discovered() -> None:
    row = architecture_of(samples.sample("mixtral"), "mixtral")
    assert (row.attn_out, row.experts) == ("o_proj", architecture("mixtral").experts)
    assert architecture("no such model_type") == architecture("nor this one")
