"""`data show` and `data stats`: what they print is what training will see."""

import json
from pathlib import Path
from typing import Any

import pytest
from spoken import make_speaker
from typer.testing import CliRunner

from mlx_adapters.cli.app import app
from mlx_adapters.data import preview
from mlx_adapters.data.sources import load_rows
from mlx_adapters.data.tokens import encode
from mlx_adapters.models.load import read_tokenizer

ROWS = [
    {"question": "tom has 3", "answer": "apples"},
    {"question": "tom has 3", "answer": "apples"},
    {"question": "how?", "answer": ""},
    {"question": "tom " * 60, "answer": "so"},
]
CHAT = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\ntom has 3<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a folder with a tokenizer and a configuration, a file of rows)."""
    root = tmp_path_factory.mktemp("preview")
    folder = make_speaker("Qwen2.5", root / "model")
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config |= {"intermediate_size": 8, "vocab_size": 300, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder, root / "rows.jsonl"


def run(*arguments: Any) -> str:
    done = CliRunner().invoke(app, ["data", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_row_is_shown_as_it_is_trained(places: tuple[Path, Path]) -> None:
    folder, file = places
    first, *others = preview.show_rows(file, folder, rows=2)
    assert (first.row, [one.row for one in others]) == (0, [1])
    assert first.pieces == [(CHAT, "context"), ("apples<|im_end|>", "learned"), ("\n", "context")]
    (example,) = encode(load_rows(str(file)), read_tokenizer(folder, {}), template="chat").examples[:1]
    assert (first.tokens, first.supervised) == (len(example.ids), example.supervised)
    (cut,) = preview.show_rows(file, folder, rows=1, cutoff=example.loss_start + 2)
    assert [kind for _, kind in cut.pieces] == ["context", "learned", "cut"]
    assert cut.supervised == 2
    assert "".join(text for text, _ in cut.pieces) == CHAT + "apples<|im_end|>\n"


def test_the_command_prints_what_is_learned_in_brackets_where_there_are_no_colours(
    places: tuple[Path, Path],
) -> None:
    folder, file = places
    text = run("show", file, "--model", folder, "--rows", 1)
    assert f"{CHAT}⟦apples<|im_end|>⟧\n" in text
    assert text.startswith("row 0: ")
    found = json.loads(run("show", file, "--model", folder, "--rows", 1, "--json"))
    assert found[0]["pieces"][1] == ["apples<|im_end|>", "learned"]


def test_statistics_count_what_training_will_see(places: tuple[Path, Path]) -> None:
    folder, file = places
    found = json.loads(run("stats", file, "--model", folder, "--json"))
    examples = encode(load_rows(str(file)), read_tokenizer(folder, {}), template="chat").examples
    lengths = sorted(len(example.ids) for example in examples)
    assert (found["rows"], found["examples"], found["template"]) == (4, 4, "chat")
    assert (found["repeated"], found["empty"]) == (1, 1)
    assert found["tokens"] == sum(lengths)
    assert found["supervised"] == sum(example.supervised for example in examples)
    assert found["lengths"]["100"] == lengths[-1]
    assert found["lengths"]["50"] in lengths
    assert sum(count for _, count in found["histogram"]) == 4
    assert found["cut"]["256"] == sum(length > 256 for length in lengths) / 4
    assert found["suggested_max_length"] == 128, "the model was made for no more"
    assert "4 rows, 4 examples with the template chat" in run("stats", file, "--model", folder)


def test_many_rows_that_are_cut_are_worth_a_sentence(tmp_path: Path) -> None:
    from tiny import make_tiny

    import mlx_adapters as ma
    from mlx_adapters.train.summary import summary

    loaded, rows = (
        ma.load(make_tiny("llama", tmp_path)),
        [{"prompt": "tom has 3", "completion": "4 " * 9}] * 20,
    )
    for length, said in (
        (8, ["100% of the rows are over 8 tokens: --max-length 13 keeps"]),
        (13, []),
    ):
        trainer = ma.Trainer(loaded, rows, output=tmp_path / f"{length}", steps=1, max_length=length)
        found = [line for line in summary(trainer) if "of the rows are over" in line]
        assert [line[: len(text)] for line, text in zip(found, said, strict=True)] == said
        trainer.detach()
