"""Faults made for real: signals, a full disk, a read-only one, two runs in one folder, files that change.

What each leaves behind stands in docs/faults.md, which names the test of every row.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import make_tiny

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "mlx_adapters.cli.app"]
WEIGHTS = "adapter_model.safetensors"
TOKEN = "hf_mustNotBeKept0123456789"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("faults"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"tom has {n % 10} apples", "completion": f"the answer is {n % 7}"} for n in range(24)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def training(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    command = [
        *COMMAND,
        "train",
        str(model),
        "--data",
        str(data),
        "--output",
        str(output),
        "--batch-size",
        "3",
    ]
    return [*command, "--template", "plain", "--save-every", "1", "--set", "rank=2", *more]


def ran(command: list[str], code: int = 0, limit: int | None = None) -> str:
    """Run a command that must end with `code`, and return what it said on stderr; one line for code 2."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    env = os.environ | {"HF_TOKEN": TOKEN}
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=120, preexec_fn=limited, check=False
    )
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    if code == 2:
        assert [line.startswith("error: ") for line in done.stderr.splitlines()].count(True) == 1
        assert done.stderr.splitlines()[-1].startswith("error: ")
    return done.stderr


@contextmanager
def started(command: list[str], until: Callable[[], bool]) -> Iterator[subprocess.Popen[str]]:
    """A process that has come so far that `until` holds; it is gone afterwards."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while not until():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


def steps(output: Path) -> int:
    file = output / "metrics.jsonl"
    return file.read_text().count('"step"') if file.exists() else 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
        )
        if shutil.which("mount")
        else None
    )
    if done is None or done.returncode:
        pytest.skip("mounting a small disk needs root on Linux")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte free on `disk`."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    stream.write(b"x" * size)
            except OSError:
                pass
    return filler


# Signals ---------------------------------------------------------------------------------------------------


def test_sigterm_saves_a_training_and_a_second_run_keeps_out(model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = training(model, data, output, "--steps", "400")
    with started(command, lambda: steps(output) > 3) as process:
        assert f"{output}: another run is writing there" in ran([*command, "--resume"], 2)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
    found = re.search(r"interrupted at step (\d+): saved in", said)
    assert found, said
    assert "Traceback" not in said
    again = training(model, data, output, "--steps", "400", "--resume")
    with started(
        again, lambda: steps(output) > int(found[1]) + 1
    ) as process:  # the lock went with its process
        process.send_signal(signal.SIGKILL)


def test_sigterm_ends_an_evaluation_that_goes_on(model: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [*COMMAND, "eval", str(model), "--task", "wordproblems", "--limit", "200", "--batch-size", "1"]
    command += ["--max-tokens", "16", "--output", str(report)]
    records = tmp_path / "report.partial.jsonl"
    with started(command, lambda: records.exists() and records.read_text().count("\n") > 4) as process:
        assert "another run is writing there" in ran([*command, "--resume"], 2)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    kept = records.read_text().count("\n") - 1
    assert 4 <= kept < 200
    ran([*command, "--resume"])
    assert len(json.loads(report.read_text())["records"]) == 200


@pytest.mark.parametrize("jobs", [1, 2])
def test_sigterm_reaches_the_cells_of_a_study(model: Path, data: Path, tmp_path: Path, jobs: int) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(
        f"model: {model}\ndata: {data}\ntasks: wordproblems\nlimit: 2\nbase: false\nmax_tokens: 4\n"
        "train: {steps: 5000, batch_size: 2, template: plain}\ngrid:\n"
        "  - {method: lora, size: {rank: [2, 4]}}\n"
    )
    output = tmp_path / "out"
    metrics = output / "cells"
    command = [*COMMAND, "study", str(study), "--output", str(output), "--jobs", str(jobs)]
    with started(command, lambda: len(list(metrics.rglob("metrics.jsonl"))) == jobs) as process:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=90)
    assert process.returncode == 130, said
    assert "FAILED" not in said
    assert "--resume" not in said, "study has no such option"
    assert jobs == 2 or "Run the study again to go on" in said
    assert len(list(metrics.rglob("metrics.jsonl"))) == jobs  # no other cell was begun
    for log in metrics.rglob("log.txt"):
        assert "Run the study again to go on" in log.read_text() or "interrupted" in log.read_text()
    left = subprocess.run(["pgrep", "-f", str(output)], capture_output=True, text=True, check=False)
    assert left.stdout == ""


# Disks -----------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_during_training(model: Path, data: Path, tmp_path: Path, disk: Path) -> None:
    output, whole = disk / "out", tmp_path / "whole"
    with started(training(model, data, output, "--steps", "60"), lambda: steps(output) > 3) as process:
        filler = fill(disk)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2, said
    last = said.splitlines()[-1]
    assert last.startswith(f"error: {output}")
    assert "cannot be written" in last
    filler.unlink()
    ran(training(model, data, output, "--steps", "60", "--resume"))
    ran(training(model, data, whole, "--steps", "60"))
    assert (output / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_full_disk_takes_no_half_file(model: Path, data: Path, tmp_path: Path, disk: Path) -> None:
    ran(training(model, data, tmp_path / "a", "--steps", "1"))
    fill(disk)
    for command in (
        ["convert", str(model), str(disk / "out")],
        ["export", str(tmp_path / "a"), str(disk / "out"), "--base", "owner/name"],
        ["eval", str(model), "--task", "wordproblems", "--limit", "1", "--output", str(disk / "out")],
    ):
        assert str(disk / "out") in ran([*COMMAND, *command], 2)
        assert not (disk / "out").exists()
        assert sorted(file.name for file in disk.iterdir() if file.stat().st_size) == ["filler"]


def test_a_write_that_stops_halfway(model: Path, data: Path, tmp_path: Path) -> None:
    """No root needed: the system refuses files of over ten thousand bytes."""
    said = ran([*COMMAND, "convert", str(model), str(tmp_path / "out")], 2, limit=10_000)
    assert str(tmp_path / "out") in said
    said = ran(training(model, data, tmp_path / "run", "--steps", "2"), 2, limit=3_000)
    assert str(tmp_path / "run") in said
    assert not (tmp_path / "out").exists()
    assert [file for file in tmp_path.iterdir() if file.name.endswith(".part")] == []
    assert list((tmp_path / "run").rglob(WEIGHTS)) == []


def test_a_disk_that_cannot_be_written(model: Path, data: Path, tmp_path: Path, disk: Path) -> None:
    ran(training(model, data, tmp_path / "a", "--steps", "1"))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    out = disk / "out"
    evaluate = [*COMMAND, "eval", str(model), "--task", "wordproblems", "--limit", "1"]
    for command in (
        training(model, data, out, "--steps", "1"),
        [*COMMAND, "convert", str(model), str(out)],
        [*COMMAND, "export", str(tmp_path / "a"), str(out), "--base", "owner/name"],
        [*evaluate, "--output", str(out / "r.json")],
    ):
        said = ran(command, 2)
        assert str(disk) in said
        assert "ead-only" in said
    assert not out.exists()


# Files that change -----------------------------------------------------------------------------------------


def test_what_changed_since_the_checkpoint_is_named(model: Path, data: Path, tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    shutil.copytree(model, base)
    command = training(base, data, output, "--steps", "3")
    ran(command)
    before = (output / WEIGHTS).read_bytes()
    kept = data.read_text()
    data.write_text(kept.replace("apples", "7", 1))
    assert "data" in ran([*command, "--resume"], 2).splitlines()[-1]
    data.write_text(kept)
    make_tiny("llama", tmp_path / "other", seed=5)
    shutil.copyfile(tmp_path / "other" / "llama" / "model.safetensors", base / "model.safetensors")
    last = ran([*command, "--resume"], 2).splitlines()[-1]
    assert "base" in last
    assert (output / WEIGHTS).read_bytes() == before


def test_data_that_changes_under_a_run_changes_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    """It is read once, at the start; so are the weights."""
    base, output, whole = tmp_path / "base", tmp_path / "out", tmp_path / "whole"
    shutil.copytree(model, base)
    ran(training(base, data, whole, "--steps", "40"))
    with started(training(base, data, output, "--steps", "40"), lambda: steps(output) > 1) as process:
        data.write_text("")
        (base / "model.safetensors").unlink()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert (output / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


# Secrets ---------------------------------------------------------------------------------------------------


def test_no_file_keeps_the_token(model: Path, data: Path, tmp_path: Path) -> None:
    """What is said is looked at in `ran`."""
    ran(training(model, data, tmp_path / "a", "--steps", "2"))
    ran([*COMMAND, "export", str(tmp_path / "a"), str(tmp_path / "b"), "--base", "owner/name"])
    ran([*COMMAND, "convert", str(model), str(tmp_path / "c")])
    report = [
        "--task",
        "wordproblems",
        "--limit",
        "1",
        "--max-tokens",
        "2",
        "--output",
        str(tmp_path / "r.json"),
    ]
    ran([*COMMAND, "eval", str(model), "--adapter", str(tmp_path / "a"), *report])
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 15
    assert [file for file in files if TOKEN.encode() in file.read_bytes()] == []


def test_the_table_names_a_test_for_every_row() -> None:
    rows = [
        line.split("|") for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if "`test_" in line
    ]
    assert len(rows) > 15
    for row in rows:
        for file, name in re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[-2]):
            assert f"def {name}(" in next((ROOT / "tests").rglob(file)).read_text(), (file, name)
        assert re.search(r"`test_\w+\.py::test_\w+`", row[-2]), row
