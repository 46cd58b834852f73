"""A run is resumed with nothing retyped, and may grow."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from command_line import cli
from tiny import make_tiny

from mlx_adapters.errors import ConfigError
from mlx_adapters.train.run_file import RUN, read_run

FIXED = [
    "--batch-size",
    2,
    "--schedule",
    "constant",
    "--warmup",
    0,
    "--lr",
    0.01,
    "--rank",
    2,
    "--dropout",
    0.1,
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    rows = ({"prompt": f"tom has {n}", "completion": f"the answer is {n}"} for n in range(6))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_resumed_run_needs_its_folder_alone_and_may_grow(model: Path, data: Path, tmp_path: Path) -> None:
    short, whole = tmp_path / "short", tmp_path / "whole"
    cli("train", model, "--data", data, "--output", short, *FIXED, "--steps", 3)
    said = cli("train", "--resume", short).stderr
    assert "finished, all 3 steps are done" in said
    said = cli("train", "--resume", short, "--steps", 5).stderr
    assert "steps was 3, now 5" in said
    cli("train", model, "--data", data, "--output", whole, *FIXED, "--steps", 5)
    arrays = [mx.load(str(folder / "adapter_model.safetensors")) for folder in (short, whole)]
    assert isinstance(arrays[0], dict)
    assert isinstance(arrays[1], dict)
    assert arrays[0].keys() == arrays[1].keys()
    assert all(mx.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0])
    losses = [(folder / "metrics.jsonl").read_text().count("\n") for folder in (short, whole)]
    assert losses[0] == losses[1]
    refused = cli("train", "--resume", short, "--steps", 2, code=2).stderr
    assert "has 5 steps already" in refused
    refused = cli("train", "--resume", short, "--lr", 0.5, code=2).stderr
    assert "lr was 0.01, now 0.5" in refused


def test_what_is_given_wins_over_what_the_folder_keeps(tmp_path: Path) -> None:
    (tmp_path / RUN).write_text(json.dumps({
        "model": "m", "data": ["a", "b"], "output": "elsewhere", "method": "lora", "set": {"rank": "2"},
        "steps": 7, "processes": 2, "exclude": "x.json",
    }))  # fmt: skip
    run = read_run(None, {"output": tmp_path, "epochs": 2}, ["alpha=4"], resume=True)
    assert (run.what.data, run.what.processes, run.what.output) == (["a", "b"], 2, str(tmp_path))
    assert run.fields == {"rank": "2", "alpha": "4"}
    assert (run.config.epochs, run.config.steps) == (2, None)
    fresh = {"model": "m", "data": ["a"], "output": tmp_path}
    assert read_run(None, fresh, []).fields == {}, "only a resumed run reads the folder"
    with pytest.raises(ConfigError, match="missing: model, data"):
        read_run(None, {"output": tmp_path / "none"}, [], resume=True)
    with pytest.raises(ConfigError, match="data=3 is not text"):
        read_run(None, fresh | {"data": 3}, [])
