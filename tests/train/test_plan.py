"""The memory plan against what a run then takes."""

import json
import shlex
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cases import few
from peaks import run_peak
from peaks_vary import once_of_three
from tiny import make_tiny
from typer.testing import CliRunner

from mlx_adapters import device, methods
from mlx_adapters.cli.app import app
from mlx_adapters.methods import LoRA
from mlx_adapters.train import plan
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.plan import predict, predict_all
from mlx_adapters.train.step_memory import Bench


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
@once_of_three
def test_prediction_is_within_15_percent(
    method: str, again: bool, rows: int, tokens: int, folder: Path
) -> None:
    config = TrainConfig(
        batch_size=rows, max_length=tokens, steps=2, warmup=0, gradient_checkpointing=again, loss_on="all"
    )
    made = methods.make(method, {})
    predicted = predict(folder, method=made, config=config)
    assert predicted.peak == pytest.approx(run_peak(folder, made, config), rel=0.15)
    assert predicted.measured < predicted.peak
    assert predicted.seconds > 0
    assert predicted.error is None


# the first two have a copy of the list they run; phi is called with a cache or not at all
@pytest.mark.parametrize("arch", ["qwen2", "qwen3_moe", "phi"])
@once_of_three
def test_blocks_are_cut_whatever_holds_them(arch: str, tmp_path: Path) -> None:
    folder = make_tiny(arch, tmp_path, num_hidden_layers=8)
    config = TrainConfig(batch_size=2, max_length=64, loss_on="all")
    bench = Bench(folder, LoRA())
    whole = bench.depth, len(bench.network.layers)
    pieces = bench.measure(config, [2], check=True)
    assert whole == (8, 6)
    assert pieces.kept > 0
    assert pieces.error is not None
    assert abs(pieces.error) < 0.15


@once_of_three
def test_checkpointing_keeps_less_than_half_of_a_block(folder: Path) -> None:
    """Without it every activation of the block is kept. What is kept beside one hidden state varies from run
    to run: when the arrays of a block that was computed again are freed is MLX's to decide."""
    bench = Bench(folder, LoRA())
    configs = [TrainConfig(max_length=256, gradient_checkpointing=again) for again in (False, True)]
    kept = [
        statistics.median(bench.measure(config, [1], check=False).kept for _ in range(5))
        for config in configs
    ]
    hidden = 256 * 128 * 4
    assert kept[1] <= 0.5 * kept[0]
    assert kept[0] > 4 * hidden


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


@once_of_three
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
    out = Path(tempfile.mkdtemp(dir=tmp_path)) / "out"  # another one each time
    places = {"my.jsonl": str(data), "my-adapter": str(out)}
    arguments = [places.get(word, word) for word in arguments]
    done = CliRunner().invoke(app, [*arguments, "--template", "plain", "--steps", "1"])
    assert done.exit_code == 0, done.output
    training = json.loads((out / "mlx_adapters.json").read_text())
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


def test_steps_are_measured_once_for_all_batch_sizes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of few blocks, and one more to compare with; a batch that a CPU computes in parts takes the
    memory of a part, as a real run does."""
    asked: list[tuple[int, int]] = []
    gradient = Bench._gradient

    def counting(bench: Bench, run: Any, blocks: int, rows: int, head: Any) -> tuple[int, float]:
        asked.append((blocks, rows))
        return gradient(bench, run, blocks, rows, head)

    monkeypatch.setattr(Bench, "_gradient", counting)
    configs = plan.candidates([1, 2, 4, 8, 16], max_length=128, loss_on="all")[:5]
    plans = list(predict_all(folder, method=LoRA(), configs=configs, check=True))
    assert [one.batch_size for one in plans] == [1, 2, 4, 8, 16]
    assert asked == [(6, 1), (2, 1), (2, 2), (4, 4 if device.on_cpu() else 16)]
    assert all(one.error == plans[0].error and abs(one.error or 1) < 0.15 for one in plans)
    if device.on_cpu():  # parts of 1, 2, 4, 4 and 4 rows
        assert plans[2].peak < plans[3].peak == plans[4].peak < 1.02 * plans[2].peak
        assert plans[4].seconds == pytest.approx(2 * plans[3].seconds)


def test_ctrl_c_keeps_what_is_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = predict_all

    def interrupted(*arguments: Any, **options: Any) -> Iterator[plan.Plan]:
        for number, one in enumerate(whole(*arguments, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(plan, "predict_all", interrupted)
    ask = ["plan", str(folder), "--batch-sizes", "1,2,4", "--tokens", "32", "--memory", "64GB", "--json"]
    done = CliRunner().invoke(app, ask)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [one["batch_size"] for one in told["plans"]] == [1, 2]
    assert "--batch-size 2" in told["command"]
    assert "--batch-size 1" in told["runner_up"]
    assert "stopped: 2 of 6 settings are known" in done.stderr
    assert "batch size 2: " in done.stderr  # each as soon as it is known


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [128, 512])
@pytest.mark.parametrize("again", [False, True])
def test_prediction_for_smollm2_is_within_15_percent(tokens: int, again: bool, smollm2: Path) -> None:
    """Batch sizes of one part, of the largest part, and of several."""
    configs = [
        TrainConfig(batch_size=rows, max_length=tokens, steps=1, warmup=0, gradient_checkpointing=again)
        for rows in (1, 4, 8)
    ]
    for one, config in zip(predict_all(smollm2, method=LoRA(), configs=configs), configs, strict=True):
        assert one.peak == pytest.approx(run_peak(smollm2, LoRA(), config), rel=0.15)
