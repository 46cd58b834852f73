"""What goes out names the base by its hub id and says how a prompt looks, and no place of this machine."""

import ast
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from adapted import logits
from command_line import cli
from tiny import make_tiny
from trained import make_adapter

from mlx_adapters import adapter
from mlx_adapters.convert import exchange
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.data.templates import prompt_for
from mlx_adapters.data.tokens import prompt_ids
from mlx_adapters.errors import AdapterError
from mlx_adapters.models import load as model
from mlx_adapters.models.origin import remember
from mlx_adapters.serve.engine import Engine
from mlx_adapters.serve.requests import CompletionRequest

COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny("llama", tmp_path_factory.mktemp("tiny"))
    config = json.loads((folder / "config.json").read_text())
    # where somebody's checkpoint was made, which is not where it is loaded from
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "someone/another-base"}))
    return folder


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub, in somebody's home, that holds me/tiny."""
    cache = tmp_path / "home of somebody" / "hub"
    repository = cache / "models--me--tiny"
    shutil.copytree(tiny, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    for name in ("main", "v2"):
        (repository / "refs" / name).write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "home of somebody" / "rows.jsonl"
    file.parent.mkdir(exist_ok=True)
    rows = [{"instruction": "tom has 3 apples", "output": f"the answer is {n}"} for n in (7, 1, 2, 5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def named(folder: Path, place: Path) -> list[str]:
    """The files of a folder that name a place of this machine."""
    return [f.name for f in folder.rglob("*") if f.is_file() and str(place).encode() in f.read_bytes()]


# The base ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("converted", [False, True])
def test_the_hub_id_that_was_given_is_remembered(
    converted: bool, hub: Path, data: Path, tmp_path: Path
) -> None:
    source: object = "me/tiny"
    if converted:
        cli("convert", "me/tiny", tmp_path / "m", "--bits", 4, "--group-size", 32, "--revision", "v2")
        source = tmp_path / "m"
    cli("train", source, "--data", data, "--output", tmp_path / "a", "--steps", 1, "--set", "rank=2")
    cli("export", tmp_path / "a", tmp_path / "p")
    fields = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "me/tiny"
    assert fields.get("revision") == ("v2" if converted else None)
    card = (tmp_path / "p" / "README.md").read_text()
    assert 'from_pretrained("me/tiny"' + (', revision="v2")' if converted else ")") in card
    assert named(tmp_path / "p", tmp_path) == []
    for format in ("mlx-lm", "llm-adapters"):
        exchange.export(tmp_path / "a", tmp_path / format, format=format)
        assert "me/tiny" in (tmp_path / format / "adapter_config.json").read_text()
        assert named(tmp_path / format, tmp_path) == []


def test_without_one_the_export_asks_for_it(tiny: Path, data: Path, tmp_path: Path) -> None:
    """A config's own _name_or_path says where somebody loaded the weights from: often another model."""
    cli("train", tiny, "--data", data, "--output", tmp_path / "a", "--steps", 1, "--set", "rank=2")
    for format in ("peft", "llm-adapters"):
        said = cli("export", tmp_path / "a", tmp_path / "p", "--format", format, code=2).stderr
        assert "which others cannot load. Give its hub id with --base OWNER/NAME" in said
        assert not (tmp_path / "p").exists()
    said = cli("push", tmp_path / "a", "me/a", "--dry-run", "--output", tmp_path / "p", code=2).stderr
    assert "Give its hub id with --base OWNER/NAME" in said
    exchange.export(tmp_path / "a", tmp_path / "l", format="mlx-lm")  # which names none then
    assert "model" not in json.loads((tmp_path / "l" / "adapter_config.json").read_text())
    assert named(tmp_path / "l", tmp_path) == []


def test_weights_that_pytorch_cannot_load_are_not_named(hub: Path, data: Path, tmp_path: Path) -> None:
    """A repository of the hub in MLX's quantization has a hub id, and is no base for PyTorch."""
    cli("convert", "me/tiny", tmp_path / "m", "--bits", 4, "--group-size", 32)
    snapshot = hub / "models--me--tiny" / "snapshots" / COMMIT
    shutil.rmtree(snapshot)
    shutil.copytree(tmp_path / "m", snapshot)
    assert (
        model.describe(model.load("me/tiny"))["_name_or_path"] == "me/tiny"
    )  # of the dense one: it remembers
    config = json.loads((snapshot / "config.json").read_text())
    config.pop("mlx_adapters")
    (snapshot / "config.json").write_text(json.dumps(config))
    assert "_name_or_path" not in model.describe(model.load("me/tiny"))


@pytest.mark.parametrize("base", ['a"+__import__("os").getcwd()+"', "C:\\models\\b", "x y/$(id)", "a'b/c`d"])
def test_the_name_of_a_base_is_data_in_the_card(base: str, tiny: Path, tmp_path: Path) -> None:
    make_adapter(tiny, tmp_path / "a", "lora", {"rank": 2}, seed=0)
    exchange.export(tmp_path / "a", tmp_path / "p", format="peft", base=base)
    card = (tmp_path / "p" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head.get("base_model") in (None, base)
    code = re.search(r"```python\n(from peft.*?)\n```", card, re.DOTALL)
    assert code is not None
    calls = [node for node in ast.walk(ast.parse(code[1])) if isinstance(node, ast.Call)]
    assert [ast.literal_eval(call.args[0]) for call in calls if len(call.args) == 1] == [base]
    line = next(line for line in card.splitlines() if line.startswith("mlx-adapters generate"))
    assert shlex.split(line)[2] == base


def test_a_stranger_s_base_that_is_no_hub_id_is_not_taken(tiny: Path, tmp_path: Path) -> None:
    make_adapter(tiny, tmp_path / "a", "lora", {"rank": 2}, seed=0)
    fields = adapter.read_fields(tmp_path / "a") | {"base_model_name_or_path": 'a/b"+exit()+"'}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(AdapterError, match="which others cannot load"):
        exchange.export(tmp_path / "a", tmp_path / "p", format="peft")


# The prompt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["alpaca", "llm-adapters", "plain", "chat"])
def test_a_card_shows_the_prompt_to_the_letter(template: str, tiny: Path, tmp_path: Path) -> None:
    made = make_adapter(tiny, tmp_path / "a", "lora", {"rank": 2}, seed=0)
    about = json.loads((made / "mlx_adapters.json").read_text())
    (made / "mlx_adapters.json").write_text(json.dumps(about | {"template": template}))
    for format in ("peft", "mlx-lm", "llm-adapters"):
        exchange.export(made, tmp_path / format, format=format, base="owner/base")
        card = (tmp_path / format / "README.md").read_text()
        code = re.search(r"## The prompt\n.*?```python\n(.*?)\n```", card, re.DOTALL)
        assert code is not None
        if template == "chat":
            assert "tokenizer.apply_chat_template(messages" in code[1]
            continue
        expected = prompt_for("YOUR INSTRUCTION", template=template, tokenizer=None, phase="eval")
        assert code[1] == f"prompt = {json.dumps(expected)}"


@pytest.mark.parametrize("to", ["transformers", "mlx"])
def test_a_fused_model_is_prompted_as_its_adapter(to: str, hub: Path, data: Path, tmp_path: Path) -> None:
    """And it is another model than its base: what is trained on it does not name that."""
    convert("me/tiny", tmp_path / "m")
    options = ("--steps", 2, "--set", "rank=2", "--template", "alpaca")
    cli("train", tmp_path / "m", "--data", data, "--output", tmp_path / "a", *options)
    cli("fuse", tmp_path / "m", tmp_path / "f", "--adapter", tmp_path / "a", "--to", to)
    ask = ("--prompt", "tom has", "--max-tokens", 6, "--json")
    of_adapter = json.loads(cli("generate", tmp_path / "m", "--adapter", tmp_path / "a", *ask).stdout)
    of_fused = json.loads(cli("generate", tmp_path / "f", *ask).stdout)
    assert of_fused == of_adapter
    assert of_fused["template"] == "alpaca"
    if to == "transformers":  # which leaves the section of config.json alone
        from transformers import AutoConfig

        assert AutoConfig.from_pretrained(tmp_path / "f").mlx_adapters == {"template": "alpaca"}
    assert 'prompt = "Below is an instruction' in (tmp_path / "f" / "README.md").read_text()
    assert named(tmp_path / "f", tmp_path) == []
    loaded = model.load(tmp_path / "f")
    assert (loaded.template, model.describe(loaded).get("_name_or_path")) == ("alpaca", None)
    (tmp_path / "test.jsonl").write_text(json.dumps({"instruction": "tom has 3", "answer": "7"}) + "\n")
    said = cli(
        "eval", tmp_path / "f", "--task", tmp_path / "test.jsonl", "--template", "plain", code=2
    ).stderr
    assert "trained with the template alpaca, not plain" in said


def test_the_server_and_the_chat_prompt_a_fused_model_so(tiny: Path, tmp_path: Path) -> None:
    from mlx_adapters.generate.conversation import Conversation

    config = remember(json.loads((tiny / "config.json").read_text()), template="alpaca")
    folder = Path(shutil.copytree(tiny, tmp_path / "f"))
    (folder / "config.json").write_text(json.dumps(config))
    for place, begins in ((folder, "Below is an instruction"), (tiny, "tom has")):
        loaded = model.load(place)
        question = {"role": "user", "content": "tom has"}
        assert (
            Engine(loaded, {}, name="m")
            ._question(CompletionRequest(model="m", messages=(question,)))
            .text.startswith(begins)
        )
        if place == folder:  # without a template of its own or the tokenizer's, chat falls back to alpaca too
            chat = Conversation(replace(loaded, config=remember(loaded.config, template="plain")))
            chat.turns = [question]
            assert chat.question().ids == prompt_ids("tom has", loaded.tokenizer)


# LLM-Adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "rank", "alpha"),
    [
        ({"rank": 8, "alpha": 16.0, "alpha_pattern": ".*=32"}, 8, 32.0),
        ({"rank": 8, "alpha": 16.0, "rank_pattern": ".*=2"}, 2, 16.0),
        ({"rank": 4, "alpha": 8.0, "rslora": True}, 4, 16.0),
    ],
    ids=str,
)
def test_what_llm_adapters_does_not_read_is_folded(
    fields: dict[str, Any], rank: int, alpha: float, tiny: Path, tmp_path: Path
) -> None:
    """Its reader knows r and lora_alpha alone."""
    make_adapter(tiny, tmp_path / "a", "lora", fields, seed=0)
    exchange.export(tmp_path / "a", tmp_path / "t", format="llm-adapters", base="owner/base")
    told = json.loads((tmp_path / "t" / "adapter_config.json").read_text())
    assert not told.keys() & {"rank_pattern", "alpha_pattern", "use_rslora"}
    assert (told["r"], told["lora_alpha"]) == (rank, alpha)
    exchange.import_adapter(tmp_path / "t", tmp_path / "b", loaded=model.load(tiny))
    expected, found = (with_adapter(tiny, tmp_path / name) for name in "ab")
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("pattern", ["alpha_pattern", "rank_pattern"])
def test_what_cannot_be_folded_is_refused(pattern: str, tiny: Path, tmp_path: Path) -> None:
    make_adapter(tiny, tmp_path / "a", "lora", {"rank": 8, pattern: "q_proj=4"}, seed=0)
    with pytest.raises(AdapterError, match=r"LLM-Adapters has one (scale|rank), this adapter has"):
        exchange.export(tmp_path / "a", tmp_path / "t", format="llm-adapters", base="owner/base")
    assert not (tmp_path / "t").exists()


def with_adapter(base: Path, folder: Path) -> np.ndarray:
    loaded = model.load(base)
    adapter.load(loaded, folder)
    loaded.model.eval()
    return logits(loaded)
