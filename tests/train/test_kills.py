"""SIGKILL at random moments, resumed each time: the final adapter is bit for bit the undisturbed run's."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import make_tiny

STEPS = 60


def command(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    program = [sys.executable, "-m", "mlx_adapters.cli.app", "train", str(model), "--data", str(data)]
    settings = ["--output", str(output), "--steps", str(STEPS), "--save-every", "3", "--batch-size", "4"]
    return [*program, *settings, "--dropout", "0.1", "--template", "plain", "--validation", "4", *more]


def resume(output: Path) -> list[str]:
    """The option, unless the kill came before the run had written anything."""
    return ["--resume"] if output.exists() else []


def digest(output: Path) -> str:
    return hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str, float]:
    """(model, data, digest of the undisturbed run, its seconds)."""
    root = tmp_path_factory.mktemp("kills")
    model, data = make_tiny("llama", root), root / "data.jsonl"
    rows = [{"prompt": f"tom has {n % 10} apples", "completion": f"the answer is {n % 7}"} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = time.monotonic()
    subprocess.run(command(model, data, root / "whole"), check=True, capture_output=True)
    return model, data, digest(root / "whole"), time.monotonic() - started


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_undisturbed(
    kills: int, setting: tuple[Path, Path, str, float], tmp_path: Path
) -> None:
    model, data, expected, seconds = setting
    draw, output, done = random.Random(kills), tmp_path / "adapter", 0
    while done < kills:
        process = subprocess.Popen(
            command(model, data, output, *resume(output)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            _, errors = process.communicate(timeout=draw.uniform(0.3, 1.0) * seconds)
            assert process.returncode == 0, errors.decode()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            done += 1
            continue
        if done < kills:  # it got through before the kill: from the start again
            assert digest(output) == expected
            output = tmp_path / f"adapter-{done}-{draw.random()}"
    subprocess.run(command(model, data, output, *resume(output)), check=True, capture_output=True)
    assert digest(output) == expected
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(STEPS + 1))  # 0 is what was measured before training
