"""Token ids and positions past a model's tables are refused wherever they enter: MLX would read on."""

import json
import math
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny
from typer.testing import CliRunner

from mlx_adapters import adapter, methods
from mlx_adapters.cli.app import app
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import CheckpointError, ConfigError, UnsupportedError
from mlx_adapters.generate.conversation import Conversation
from mlx_adapters.generate.decode import Decoding, generate_ids
from mlx_adapters.generate.likelihood import loglikelihoods
from mlx_adapters.models import limits
from mlx_adapters.models import load as model
from mlx_adapters.serve.engine import Engine
from mlx_adapters.serve.requests import CompletionRequest, RequestError
from mlx_adapters.train import metrics
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run

CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
SAID = r"token '<\|.*\|>' has the id 6[45], and the model's embedding has rows for 0 to 63"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 64 tokens whose tokenizer was given two more for its chat template."""
    from transformers import AutoTokenizer

    made = make_tiny("llama", tmp_path_factory.mktemp("more"))
    tokenizer = AutoTokenizer.from_pretrained(made)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(made)
    return made


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def rows(file: Path, made: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


def test_training_names_the_token_and_starts_nothing(folder: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "tom has 3"}, {"role": "assistant", "content": "7"}]
    data = rows(tmp_path / "d.jsonl", [{"messages": turns}] * 8)
    done = invoke("train", folder, "--data", data, "--output", tmp_path / "out", "--steps", 1)
    assert done.exit_code == 2
    assert not (tmp_path / "out").exists()
    assert re.search(SAID, done.stderr), done.stderr


def test_an_evaluation_names_the_token(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "SVAMP").mkdir()
    items = [{"instruction": "tom has 3", "input": "", "answer": "7"}]
    (tmp_path / "SVAMP" / "test.json").write_text(json.dumps(items))
    done = invoke("eval", folder, "--task", "SVAMP", "--data-dir", tmp_path, "--template", "chat")
    assert done.exit_code == 2
    assert re.search(SAID, done.stderr), done.stderr


def test_generate_and_chat_name_the_token(folder: Path) -> None:
    done = invoke("generate", folder, "--prompt", "tom has 3", "--max-tokens", 2)
    assert done.exit_code == 2
    assert re.search(SAID, done.stderr), done.stderr
    loaded = model.load(folder)
    chat = Conversation(loaded, template="plain", max_tokens=2)
    for content in ("tom has 3", "tom <|user|>"):  # the second turn goes on from the first one's cache
        chat.turns.append({"role": "user", "content": content})
        if "<" not in content:
            list(chat.answer())
    with pytest.raises(CheckpointError, match=SAID):
        list(chat.answer())


@pytest.mark.parametrize("method", ["base", "prompt"])
def test_a_client_of_the_server_gets_a_400(method: str, folder: Path) -> None:
    """The text of the token is enough. An adapter's virtual tokens stand past the table on purpose."""
    loaded = model.load(folder)
    if method == "prompt":
        config = methods.make("prompt", {"num_virtual_tokens": 3})
        adapter.attach(loaded, config)
    engine = Engine(loaded, {}, name="base")
    asked = [
        engine.submit(CompletionRequest(model="base", prompt=text, max_tokens=2))
        for text in ("tom <|user|>", "tom")
    ]
    got: list[Any] = []

    def read() -> None:
        got.extend(job.deltas.get(timeout=60) for job in asked)
        engine.stop()

    reader = threading.Thread(target=read)
    reader.start()
    engine.run()
    reader.join()
    assert isinstance(got[0], RequestError)
    assert got[0].status == 400
    assert "has the id 64" in str(got[0])
    assert not isinstance(got[1], RequestError)


@pytest.mark.parametrize("decoding", ["greedy", "beam", "sample"])
def test_no_way_of_answering_reads_past_the_table(decoding: str, folder: Path) -> None:
    network = model.load(folder).model
    with pytest.raises(CheckpointError, match="a token with the id 64"):
        list(
            generate_ids(
                network, [[4, 5], [4, 64]], stop=frozenset(), max_tokens=2, decoding=Decoding(kind=decoding)
            )
        )


def test_neither_prompt_nor_choice_is_read_past_the_table(folder: Path) -> None:
    network = model.load(folder).model
    for item in (([4, 64], [[5]]), ([4], [[5], [6, 64]]), ([4], [[-1]])):
        with pytest.raises(CheckpointError, match=r"a token with the id (64|-1)"):
            list(loglikelihoods(network, [item]))


def test_rows_of_the_library_are_checked_too(folder: Path) -> None:
    network = model.load(folder).model
    with pytest.raises(CheckpointError, match="a token with the id 70"):
        Run(network, [Example([4, 70, 5], 1)], config=TrainConfig(steps=1))


def test_a_prompt_does_not_start_from_a_token_that_is_not_there(folder: Path) -> None:
    loaded = model.load(folder)
    config = methods.make("prompt", {"init": "text", "init_text": "x", "init_ids": "4,64"})
    with pytest.raises(ConfigError, match=r"rows for 0 to 63, not for 64"):
        adapter.attach(loaded, config)


def test_padding_past_the_table_is_padding_all_the_same(folder: Path, tmp_path: Path) -> None:
    """[PAD] as the 65th token of 64: the loss is that of padding with a token which is there."""
    from transformers import AutoTokenizer

    made = make_tiny("llama", tmp_path / "pads")
    tokenizer = AutoTokenizer.from_pretrained(made)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 64
    tokenizer.save_pretrained(made)
    pairs = [{"prompt": "tom has 3 " * (1 + n % 5), "completion": "7 " * (1 + n % 3)} for n in range(8)]
    data, found = rows(tmp_path / "d.jsonl", pairs), []
    for name, base in (("pads", made), ("plain", make_tiny("llama", tmp_path / "plain"))):
        done = invoke("train", base, "--data", data, "--output", tmp_path / f"out-{name}", "--steps", 2)
        assert done.exit_code == 0, done.output
        found.append([row["loss"] for row in metrics.read(tmp_path / f"out-{name}" / "metrics.jsonl")])
    assert found[0] == found[1]


# Positions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neo", "opt"])
def test_learned_positions_end_where_the_table_does(arch: str, folders: dict[str, Path]) -> None:
    loaded = model.load(folders[arch])
    network, limit = loaded.model, 256
    assert limits.positions(network) == limits.made_for(loaded.config) == limit
    prompt = [4] * (limit - 4)
    answered = dict(generate_ids(network, [prompt], stop=frozenset(), max_tokens=4, batch_size=1))
    assert len(answered[0]) == 4
    for decoding in ("greedy", "beam"):
        with pytest.raises(
            UnsupportedError, match=r"252 tokens long and 5 new ones.* for 256.* at most 4 new"
        ):
            list(
                generate_ids(
                    network, [[4], prompt], stop=frozenset(), max_tokens=5, decoding=Decoding(kind=decoding)
                )
            )
    with pytest.raises(UnsupportedError, match="positions for 256"):
        list(loglikelihoods(network, [(prompt, [[4] * 5])]))
    with pytest.raises(UnsupportedError, match=r"300 tokens long, .* for 256: cut it \(--max-length\)"):
        Run(network, [Example([4] * 300, 1)], config=TrainConfig(steps=1))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_take_positions_and_padding_none(method: str, folders: dict[str, Path]) -> None:
    """Lengths are rounded up, which OPT as we have it refuses where gpt2 would read on."""
    for arch in ("gpt2", "opt"):
        loaded = model.load(folders[arch])
        config = methods.make(method, {"num_virtual_tokens": 6})
        adapter.attach(loaded, config)
        row = Example([4] * 250, 1)
        (step,) = Run(loaded.model, [row], [row], config=TrainConfig(steps=1, validation=1))
        assert math.isfinite(step.loss)
        assert step.validation_loss is not None
        with pytest.raises(UnsupportedError, match="257 tokens long"):
            Run(loaded.model, [Example([4] * 251, 1)], config=TrainConfig(steps=1))
        with pytest.raises(UnsupportedError, match="at most 1 new tokens"):
            list(generate_ids(loaded.model, [[4] * 249], stop=frozenset(), max_tokens=2))


def test_generate_says_how_many_new_tokens_there_is_room_for(folders: dict[str, Path]) -> None:
    done = invoke("generate", folders["gpt2"], "--prompt", "tom has 3", "--max-tokens", 254)
    assert done.exit_code == 2
    assert "ask for at most 253 new tokens" in done.stderr


def test_the_server_knows_the_length_whatever_it_is_called(folders: dict[str, Path]) -> None:
    assert Engine(model.load(folders["gpt2"]), {}, name="base").context == 256
    named = {
        "max_position_embeddings": 7,
        "n_positions": 7,
        "seq_length": 7,
        "text_config": {"max_position_embeddings": 7},
    }
    assert {limits.made_for({name: value}) for name, value in named.items()} == {7}
    assert limits.made_for({"model_type": "mamba"}) is None


def test_rotary_positions_are_only_advised(folders: dict[str, Path], tmp_path: Path) -> None:
    text = "tom " * 300
    data = rows(tmp_path / "d.jsonl", [{"text": text}] * 2)
    options = ("--data", data, "--output", tmp_path / "out", "--steps", 1, "--max-length", 400)
    done = invoke("train", folders["llama"], *options)
    assert done.exit_code == 0, done.output
    assert "2 rows are longer than the 256 tokens that the model was made for" in done.stderr
