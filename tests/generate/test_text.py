"""One question from Python: the answer of the command, under an adapter of its own."""

from pathlib import Path

import pytest
from tiny import make_tiny
from trained import make_adapter
from typer.testing import CliRunner

from mlx_adapters import adapter as adapters
from mlx_adapters.adapter import multi
from mlx_adapters.cli.app import app
from mlx_adapters.errors import AdapterError, ConfigError
from mlx_adapters.generate.conversation import Conversation
from mlx_adapters.generate.text import generate, stream
from mlx_adapters.models.load import LanguageModel, load

PROMPT = "tom has 3 apples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    model = make_tiny("llama", root).rename(root / "model")
    for name, method, fields in (
        ("lora", "lora", {"rank": 4}),
        ("prefix", "prefix", {"num_virtual_tokens": 3}),
    ):
        make_adapter(model, root / name, method, fields, seed=3)
    return root


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LanguageModel:
    return load(folder / "model", answering=True)


@pytest.mark.parametrize("name", [None, "lora", "prefix"])
def test_the_answer_is_that_of_the_command(name: str | None, folder: Path, loaded: LanguageModel) -> None:
    adapter = folder / name if name else None
    command = ["generate", str(folder / "model"), "--prompt", PROMPT, "--max-tokens", "12"]
    said = CliRunner().invoke(app, [*command, *(["--adapter", str(adapter)] if adapter else [])]).stdout
    answer = stream(loaded, PROMPT, adapter=adapter, max_tokens=12)
    assert "".join(answer) == answer.text == said.removesuffix("\n")
    assert (answer.finish_reason, answer.tokens) == ("length", 12)
    assert (
        generate(str(folder / "model"), PROMPT, adapter=adapter and str(adapter), max_tokens=12)
        == answer.text
    )


def test_an_adapter_folder_is_there_for_the_question_alone(folder: Path, loaded: LanguageModel) -> None:
    base = generate(loaded, PROMPT, max_tokens=12)
    adapted = generate(loaded, PROMPT, adapter=folder / "lora", max_tokens=12)
    assert adapted != base
    assert not adapters.layers(loaded.model)
    assert multi.names(loaded.model) == []
    assert generate(loaded, PROMPT, max_tokens=12) == base
    cut = iter(stream(loaded, PROMPT, adapter=folder / "lora", max_tokens=12))
    next(cut)
    cut.close()  # type: ignore[attr-defined]
    assert not adapters.layers(loaded.model)


def test_an_adapter_that_is_loaded_answers_by_its_name(folder: Path) -> None:
    loaded = load(folder / "model", answering=True)
    alone = {
        name: generate(loaded, PROMPT, adapter=folder / name, max_tokens=12) for name in ("lora", "prefix")
    }
    multi.load_adapters(loaded, {name: folder / name for name in alone})
    multi.activate(loaded.model, "prefix")
    assert generate(loaded, PROMPT, adapter="lora", max_tokens=12) == alone["lora"]
    assert multi.active(loaded.model) == ("prefix",)
    assert generate(loaded, PROMPT, max_tokens=12) == alone["prefix"], "None: the model as it is"


def test_mistakes_are_raised_before_the_first_piece(folder: Path, loaded: LanguageModel) -> None:
    with pytest.raises(AdapterError):
        stream(loaded, PROMPT, adapter=folder / "nowhere")
    with pytest.raises(ConfigError, match="Unknown template 'plane'"):
        stream(loaded, PROMPT, template="plane")
    with pytest.raises(ConfigError, match="is empty"):
        stream(loaded, "", template="plain")


def test_an_answer_that_is_left_early_is_kept_as_far_as_it_got(loaded: LanguageModel) -> None:
    whole, cut = (Conversation(loaded, template="plain", max_tokens=12) for _ in range(2))
    first = "".join(whole.ask(PROMPT))
    pieces = cut.ask(PROMPT)
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert cut.turns == [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": begun}]
    assert first.startswith(begun)
    cut.turns = list(whole.turns)  # the cache of the answer that was cut must not be continued
    assert "".join(cut.ask("how many ?")) == "".join(whole.ask("how many ?"))
