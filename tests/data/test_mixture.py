"""Several sources in one run: one after the other, or drawn by weight; rows of different forms together."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_run
from small_run import losses
from spoken import make_speaker
from typer.testing import CliRunner

from mlx_adapters.cli.app import app
from mlx_adapters.data import large
from mlx_adapters.data.batches import groups
from mlx_adapters.data.mixture import Weighted, parse_weights, shares, together
from mlx_adapters.data.picked import pick
from mlx_adapters.data.sources import Rows, load_rows
from mlx_adapters.data.tokens import Example, encode
from mlx_adapters.errors import ConfigError, DataError, TrainingError
from mlx_adapters.models import load as model
from mlx_adapters.train.trainer import Trainer

PAIRS = [{"prompt": f"tom has {n} apples", "completion": "it is"} for n in range(20)]
TASKS = [{"instruction": f"how {n}", "input": "and 3", "output": "is it"} for n in range(8)]
TALKS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{n}"}]}
    for n in range(5)
]


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> model.LanguageModel:
    return model.load(folders["llama"])


def jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    return str(small_run.jsonl(file, rows))


def run(loaded: model.LanguageModel, data: Any, output: Path, **options: Any) -> Trainer:
    settings = {"template": "plain", "steps": 8, "lr": 1e-2, "save_every": 2, "batch_size": 4}
    return Trainer(loaded, data, "lora", output=output, **settings | options)


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [(28, [1, 1], [14, 14]), (10, [3, 1], [8, 2]), (7, [0.5, 0.25, 0.25], [3, 2, 2]), (5, [2], [5])],
)
def test_shares_add_up(total: int, weights: list[float], expected: list[int]) -> None:
    assert shares(total, weights) == expected


def test_an_epoch_draws_by_weight_and_each_source_in_turn() -> None:
    """20 rows with weight 1 and 8 with weight 3: seven of the former are drawn an epoch, 21 of the latter."""
    sources = np.repeat([0, 1], [20, 8])
    examples = [Example([number] * 3, 1) for number in range(28)]
    mixed = Weighted(examples, sources, [1, 3])
    epochs = [
        [i for group in groups(mixed, batch_size=4, seed=2, epoch=e) for (i,) in group] for e in range(8)
    ]
    for drawn in epochs:
        assert Counter(int(sources[i]) for i in drawn) == {0: 7, 1: 21}
    assert epochs[0] != epochs[1]
    for source, size in ((0, 20), (1, 8)):
        counts = Counter(i for drawn in epochs for i in drawn if sources[i] == source)
        assert len(counts) == size
        assert max(counts.values()) - min(counts.values()) <= 1  # none comes again before all have come
    again = [i for group in groups(mixed, batch_size=4, seed=2, epoch=3) for (i,) in group]
    assert again == epochs[3]
    fewer = pick(mixed, np.arange(4, 28))
    assert isinstance(fewer, Weighted)
    assert fewer.described == "1:3 of 16+8 rows"
    assert sorted(i for group in groups(fewer, batch_size=4, shuffle=False) for (i,) in group) == [*range(24)]


@pytest.mark.parametrize("packing", [False, True])
def test_a_mixture_is_resumed_and_lies_on_disk_as_in_memory(
    packing: bool, loaded: model.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [jsonl(tmp_path / "a.jsonl", PAIRS), jsonl(tmp_path / "b.jsonl", PAIRS[:6])]
    options: dict[str, Any] = {"weights": "1,2", "validation": 3, "packing": packing, "max_length": 12}
    expected = losses(run(loaded, data, tmp_path / "whole", **options))
    assert expected != losses(run(loaded, data, tmp_path / "plain", **options | {"weights": None}))
    losses(run(loaded, data, tmp_path / "cut", **options), stop=4)
    with pytest.raises(TrainingError, match=r"mixture was '1:2 of \d+\+\d+ rows', now '1:3 of"):
        run(loaded, data, tmp_path / "cut", **options | {"weights": "1,3"}, resume=True)
    monkeypatch.setenv("MLX_ADAPTERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(large, "LARGE", 500)  # bytes: the first file lies on disk, the second does not
    assert losses(run(loaded, data, tmp_path / "cut", **options, resume=True)) == expected[4:]
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_rows_of_different_forms_become_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row has the tokens that it has where its source is alone, with the chat template."""
    from mlx_lm.tokenizer_utils import load

    tokenizer = load(make_speaker("Qwen2.5", tmp_path))
    files = [jsonl(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate((PAIRS, TASKS, TALKS))]
    alone = [encode(load_rows(file), tokenizer, template="chat").examples for file in files]
    for bytes_of_large in (1 << 40, 1):
        monkeypatch.setattr(large, "LARGE", bytes_of_large)
        rows = together([load_rows(file) for file in files])
        assert (rows.format, len(rows.rows)) == ("messages", 33)
        both = encode(Rows(list(rows.rows), rows.format, ""), tokenizer, template="chat").examples
        assert both == [example for examples in alone for example in examples]
        assert [part.format for part in rows.parts] == ["completion", "instruction", "messages"]
    same = together([load_rows(file) for file in files[:1] * 2])
    assert same.format == "completion"


def test_rows_that_cannot_be_trained_together_are_refused(tmp_path: Path) -> None:
    text, pairs = jsonl(tmp_path / "t.jsonl", [{"text": "a"}]), jsonl(tmp_path / "p.jsonl", PAIRS)
    with pytest.raises(
        DataError, match=r"t.jsonl: rows of text.* p.jsonl are of the form completion".replace(" p", " .*p")
    ):
        together([load_rows(pairs), load_rows(text)])


@pytest.mark.parametrize("text", ["", "a,b", "1,0", "1,-2", "1,inf", "1;2", "1", "1,2,3"])
def test_weights_are_checked(text: str) -> None:
    with pytest.raises(ConfigError, match="weights"):
        parse_weights(text, 2)


def test_a_source_that_would_give_no_row_is_named(loaded: model.LanguageModel, tmp_path: Path) -> None:
    data = [jsonl(tmp_path / "a.jsonl", PAIRS), jsonl(tmp_path / "b.jsonl", PAIRS[:6])]
    with pytest.raises(DataError, match="source number 2 gives no row to an epoch of 26"):
        run(loaded, data, tmp_path / "out", weights="1000,1")


def test_the_command_takes_several(folders: dict[str, Path], tmp_path: Path) -> None:
    data = [jsonl(tmp_path / "a.jsonl", PAIRS), jsonl(tmp_path / "b.jsonl", PAIRS[:6])]
    words = ["train", str(folders["llama"]), "--data", data[0], "--data", data[1], "--template", "plain"]
    words += ["--steps", "2", "--output", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, [*words, "--weights", "1"])
    assert refused.exit_code == 2
    assert "1 number for 2 sources" in refused.stderr
    done = CliRunner().invoke(app, [*words, "--weights", "1,2"])
    assert done.exit_code == 0, done.stderr
    assert "a.jsonl, " in done.stderr
    about = json.loads((tmp_path / "out" / "mlx_adapters.json").read_text())
    assert about["training"]["weights"] == "1,2"
