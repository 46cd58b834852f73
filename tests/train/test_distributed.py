"""Data parallel runs: several local processes give the losses and the adapter of one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch import LAUNCH, free_ports
from safetensors.numpy import load_file
from tiny import make_tiny

pytestmark = pytest.mark.skipif(
    not LAUNCH.exists(), reason="mlx.launch comes with mlx; it is not beside python"
)


def command(count: int, setting: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    model, data = setting
    program = [sys.executable, "-m", "mlx_adapters.cli.app", "train", str(model), "--data", str(data)]
    program += ["--output", str(output), "--template", "plain", "--lr", "0.01", "--warmup", "2"]
    program += ["--eval-task", str(data.with_name("test.jsonl")), "--eval-limit", "3", "--eval-every", "10"]
    launch = [str(LAUNCH), "-n", str(count), "--backend", "ring", "-p", str(free_ports(count)), "--"]
    return [*(launch if count > 1 else []), *program, *more]


def run(count: int, setting: tuple[Path, Path], output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(count, setting, output, *more), capture_output=True, text=True, timeout=120, check=False
    )


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def compare(left: Path, right: Path) -> None:
    a, b = records(left), records(right)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    assert [row.get("tokens") for row in a] == [row.get("tokens") for row in b]
    for name in ("loss", "grad_norm", "validation_loss", "accuracy"):
        np.testing.assert_allclose(
            [row.get(name, 0) for row in a], [row.get(name, 0) for row in b], rtol=1e-5, err_msg=name
        )
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (left, right))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(theirs[name], array, atol=2e-4)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model, data of 31 rows: with 6 rows a step 25 leave a last batch of one, which two processes lack)."""
    root = tmp_path_factory.mktemp("distributed")
    data = root / "data.jsonl"
    rows = [
        {"prompt": f"tom has {n % 10} apples" + " and" * (n % 5), "completion": f"the answer is {n % 7}"}
        for n in range(31)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test = [{"question": row["prompt"], "answer": row["completion"].split()[-1]} for row in rows]
    data.with_name("test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in test))
    return make_tiny("llama", root), data


EPOCHS = ("--epochs", "2", "--validation", "6", "--validate-every", "4")


@pytest.fixture(scope="module")
def alone(setting: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "adapter"
    done = run(1, setting, output, "--batch-size", "6", *EPOCHS)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize(
    ("count", "more"),
    [(2, ()), (3, ()), (2, ("--packing", "--max-length", "40", "--gradient-checkpointing"))],
)
def test_processes_match_one(
    count: int, more: tuple[str, ...], setting: tuple[Path, Path], alone: Path, tmp_path: Path
) -> None:
    if more:
        alone = tmp_path / "alone"
        assert run(1, setting, alone, "--batch-size", "6", *EPOCHS, *more).returncode == 0
    done = run(count, setting, tmp_path / "adapter", "--batch-size", str(6 // count), *EPOCHS, *more)
    assert "trained" in done.stdout, done.stderr
    assert done.stdout.count("trained") == 1, "one process speaks"
    assert len(re.findall("rows to train on", done.stdout + done.stderr)) == 1
    compare(alone, tmp_path / "adapter")
    last = records(alone)[-1]
    assert last["step"] == 10 or more
    assert "accuracy" in last


def test_a_run_goes_on_with_another_number_of_processes(
    setting: tuple[Path, Path], alone: Path, tmp_path: Path
) -> None:
    """Three start, two go on from what three had done, one from what two had."""
    output, settings = tmp_path / "adapter", ("--save-every", "3", "--keep", "9", *EPOCHS)
    assert run(3, setting, output, "--batch-size", "2", *settings).returncode == 0
    for step, count in ((3, 2), (6, 1)):
        for folder in (output / "checkpoints").iterdir():
            if int(folder.name[-6:]) > step:
                shutil.rmtree(folder)
        done = run(count, setting, output, "--batch-size", str(6 // count), *settings, "--resume")
        assert f"resuming after step {step}" in done.stderr + done.stdout, done.stderr
        compare(alone, output)
    other = run(1, setting, output, "--batch-size", "4", *settings, "--resume")
    assert "rows per batch, of all processes together was 6, now 4" in other.stderr


def test_different_data_is_refused(setting: tuple[Path, Path], tmp_path: Path) -> None:
    """Each machine reads its own copy of the file."""
    model, data = setting
    script = tmp_path / "two.py"
    script.write_text(
        "import os, sys\n"
        "rank = os.environ['MLX_RANK']\n"
        "sys.argv = ['mlx-adapters', *sys.argv[1:]]\n"
        "data = sys.argv.index('--data') + 1\n"
        "sys.argv[data] = sys.argv[data].replace('RANK', rank)\n"
        "from mlx_adapters.cli.app import main\n"
        "main()\n"
    )
    for rank in range(2):
        lines = data.read_text().splitlines()
        (tmp_path / f"data-{rank}.jsonl").write_text("\n".join(lines[: 30 - rank]) + "\n")
    done = subprocess.run(
        [str(LAUNCH), "-n", "2", "--backend", "ring", "-p", str(free_ports(2)), "--", sys.executable]
        + [str(script), "train", str(model), "--data", str(tmp_path / "data-RANK.jsonl")]
        + ["--output", str(tmp_path / "adapter"), "--template", "plain", "--steps", "4"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "2 processes have different settings or data" in done.stdout + done.stderr


def test_a_dead_process_ends_the_run_with_a_message_and_the_rest_resumes(
    setting: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    more = ("--batch-size", "3", "--save-every", "2", "--steps", "100000", "--schedule", "constant")
    process = subprocess.Popen(
        command(2, setting, output, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 60
    while len(list(output.glob("checkpoints/step-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    victims = [
        int(pid)
        for pid in subprocess.check_output(["pgrep", "-f", f"cli.app train .*{output}"], text=True).split()
        if int(pid) != process.pid
    ]
    os.kill(max(victims), signal.SIGKILL)
    told, _ = process.communicate(timeout=60)
    assert re.search(r"rank \d exited with code -9", told), told
    newest = max(int(folder.name[-6:]) for folder in output.glob("checkpoints/step-*"))
    settings = ("--batch-size", "6", *more[2:])
    again = subprocess.Popen(
        command(1, setting, output, *settings, "--resume"), stderr=subprocess.PIPE, text=True
    )
    while max(int(folder.name[-6:]) for folder in output.glob("checkpoints/step-*")) <= newest:
        assert time.monotonic() < deadline + 60
        time.sleep(0.1)
    again.send_signal(signal.SIGINT)
    _, said = again.communicate(timeout=30)
    assert f"resuming after step {newest}" in said
    assert again.returncode == 130, said


def test_processes_of_one_machine_by_an_option(
    setting: tuple[Path, Path], alone: Path, tmp_path: Path
) -> None:
    """`--processes` shares the batch that was asked for; a refusal and a death have their exit codes."""
    output = tmp_path / "adapter"
    done = run(1, setting, output, "--batch-size", "6", *EPOCHS, "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained") == 1
    compare(alone, output)
    again = run(1, setting, output, "--batch-size", "6", *EPOCHS, "--processes", "2")
    assert again.returncode == 2
    assert "is not empty" in again.stderr
    odd = run(1, setting, tmp_path / "odd", "--batch-size", "5", "--processes", "2")
    assert odd.returncode == 2
    assert "batch_size=5 must be a multiple of processes=2" in odd.stderr
    assert not (tmp_path / "odd").exists()


def test_interrupting_the_processes_saves_once(setting: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    more = ("--batch-size", "4", "--steps", "100000", "--save-every", "5", "--processes", "2")
    process = subprocess.Popen(command(1, setting, output, *more), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(output.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.count("interrupted at step") == 1
    assert (output / "adapter_model.safetensors").exists()
