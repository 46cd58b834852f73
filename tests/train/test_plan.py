"""The memory plan against what a run then takes."""

import json
import shlex
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from cases import few
from tiny import make_tiny
from typer.testing import CliRunner

from mlx_adapters import adapter, device, methods
from mlx_adapters.cli.app import app
from mlx_adapters.data.tokens import Example
from mlx_adapters.methods import LoRA
from mlx_adapters.models import load as model
from mlx_adapters.train import plan
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run
from mlx_adapters.train.plan import _peak, predict, predict_all


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten layers, wide enough that arrays outweigh the rest."""
    root = tmp_path_factory.mktemp("plan")
    return make_tiny(
        "llama", root, num_hidden_layers=10, hidden_size=128, intermediate_size=256, num_attention_heads=8
    )


@pytest.mark.parametrize("method", few(["lora", "dora", "prefix", "parallel"], every=2))
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 64), (8, 128)])
def test_prediction_is_within_15_percent(
    method: str, again: bool, rows: int, tokens: int, folder: Path
) -> None:
    config = TrainConfig(
        batch_size=rows, max_length=tokens, steps=2, warmup=0, gradient_checkpointing=again, loss_on="all"
    )
    predicted = predict(folder, method=methods.make(method, {}), config=config)
    loaded = model.load(folder)
    adapter.attach(loaded, methods.make(method, {}))
    mx.eval(loaded.model.parameters())
    mx.reset_peak_memory()
    ids = np.random.default_rng(0).integers(0, 64, (rows, tokens)).tolist()
    for _ in Run(loaded.model, [Example(row, 1) for row in ids], config=config):
        pass
    assert predicted.peak == pytest.approx(mx.get_peak_memory(), rel=0.15)
    assert predicted.measured < predicted.peak


# the first two have a copy of the list they run; phi is called with a cache or not at all
@pytest.mark.parametrize("arch", ["qwen2", "qwen3_moe", "phi"])
def test_blocks_are_cut_whatever_holds_them(arch: str, tmp_path: Path) -> None:
    folder = make_tiny(arch, tmp_path, num_hidden_layers=8)
    config = TrainConfig(batch_size=2, max_length=64, loss_on="all")
    peaks = [_peak(folder, LoRA(), config, blocks) for blocks in (2, 6)]
    assert peaks[1] > peaks[0]


def test_checkpointing_costs_one_hidden_state_per_token_and_layer(folder: Path) -> None:
    """Growth per layer: the block's weights and trained arrays, and one hidden state per token."""
    config = TrainConfig(batch_size=4, max_length=256, gradient_checkpointing=True, loss_on="all")
    peaks = [_peak(folder, LoRA(), config, blocks) for blocks in (4, 8)]
    loaded = model.load(folder)
    block = sum(v.nbytes for _, v in _leaves(loaded.model.layers[0]))
    adapters = 4 * 4 * 2 * 8 * (128 + 128)  # rank 8 on q and v: weight, gradient, two moments
    hidden = 4 * 256 * 128 * 4
    assert (peaks[1] - peaks[0]) / 4 <= 1.02 * (block + adapters + hidden)


def _leaves(module: object) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return tree_flatten(module.parameters())  # type: ignore[attr-defined, no-any-return]


def test_command_says_what_fits(folder: Path) -> None:
    done = CliRunner().invoke(
        app, ["plan", str(folder), "--batch-sizes", "1,2", "--memory", "1MB", "--tokens", "32", "--json"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [plan["batch_size"] for plan in told["plans"]] == [1, 2, 1, 2]
    assert not any(plan["fits"] for plan in told["plans"])
    assert told["command"] is None


@pytest.mark.parametrize(("option", "value"), [("--memory", "lots"), ("--batch-sizes", "1,x")])
def test_command_refuses_nonsense(option: str, value: str, folder: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(folder), option, value])
    assert done.exit_code == 2
    assert value in done.stderr


def test_the_last_line_is_a_command_that_trains_what_fits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest batch without gradient checkpointing where that fits, else with it; the given settings."""
    ask = ["plan", str(folder), "--batch-sizes", "2,3", "--tokens", "32", "--method", "parallel"]
    ask += ["--set", "bottleneck_size=4", "--loss-on", "all"]
    rich = CliRunner().invoke(app, [*ask, "--memory", "64GB"])
    assert rich.exit_code == 0, rich.output
    program, *arguments = shlex.split(rich.stdout.splitlines()[-1])
    assert program == "mlx-adapters"
    assert "--gradient-checkpointing" not in arguments
    assert arguments[arguments.index("--batch-size") + 1] == "3"
    data = tmp_path / "my.jsonl"
    data.write_text('{"prompt": "tom has", "completion": "7"}\n' * 5)
    places = {"my.jsonl": str(data), "my-adapter": str(tmp_path / "out")}
    arguments = [places.get(word, word) for word in arguments]
    done = CliRunner().invoke(app, [*arguments, "--template", "plain", "--steps", "1"])
    assert done.exit_code == 0, done.output
    training = json.loads((tmp_path / "out" / "mlx_adapters.json").read_text())
    assert training["method"] == "parallel"
    assert training["config"]["bottleneck_size"] == 4
    assert (training["training"]["batch_size"], training["training"]["max_length"]) == (3, 32)

    monkeypatch.setattr(plan, "overhead", lambda plans: 0)  # what this process took before differs by more
    plans = json.loads(CliRunner().invoke(app, [*ask, "--json", "--memory", "64GB"]).stdout)
    needed = {(one["gradient_checkpointing"], one["batch_size"]): one["peak"] for one in plans["plans"]}
    assert needed[True, 3] < needed[False, 2]
    limit = plans["process"] + (needed[True, 3] + needed[False, 2]) // 2
    poor = json.loads(CliRunner().invoke(app, [*ask, "--json", "--memory", str(limit)]).stdout)
    assert poor["command"] is None or "--gradient-checkpointing" in poor["command"]


@pytest.mark.parametrize("again", [False, True])
def test_batches_of_like_parts_are_measured_once_and_take_as_much(
    again: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU; a GPU computes a batch whole. Rows of 128 tokens: parts of 1, 2, 4, 4, 5 and 4 rows."""
    configs = [
        TrainConfig(batch_size=rows, max_length=128, loss_on="all", gradient_checkpointing=again)
        for rows in (1, 2, 4, 8, 10, 16)
    ]
    asked: list[int] = []

    def counting(*arguments: Any) -> int:
        asked.append(arguments[2].batch_size)
        return _peak(*arguments)

    monkeypatch.setattr(plan, "_peak", counting)
    plans = list(predict_all(folder, method=LoRA(), configs=configs))
    assert [one.batch_size for one in plans] == [1, 2, 4, 8, 10, 16]
    if not device.on_cpu():
        assert asked == [1, 1, 2, 2, 4, 4, 8, 8, 10, 10, 16, 16]
        return
    assert asked == [1, 1, 2, 2, 8, 8, 10, 10]
    assert plans[2].peak == plans[3].peak == plans[5].peak
    largest = _peak(folder, LoRA(), configs[5], 4)
    assert largest == pytest.approx(_peak(folder, LoRA(), configs[3], 4), rel=0.02)
    assert largest == pytest.approx(_peak(folder, LoRA(), configs[2], 4), rel=0.05)
