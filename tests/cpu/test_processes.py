"""Processes that a command starts: gone when it is, and nothing of the folder it stands in is run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from launch import LAUNCH, free_ports
from study_files import study_file
from tiny import make_tiny

COMMAND = [sys.executable, "-P", "-m", "mlx_adapters.cli.app"]  # as the console script: without the folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model"))


def rows(folder: Path, count: int) -> Path:
    file = folder / "items.json"
    made = [
        {"instruction": f"tom has {n} apples", "output": str(n), "answer": str(n), "input": ""}
        for n in range(count)
    ]
    file.write_text(json.dumps(made))
    return file


def training(model: Path, folder: Path, steps: int) -> list[str]:
    command = ["train", str(model), "--data", str(rows(folder, 24)), "--output", str(folder / "out")]
    return [*command, "--steps", str(steps), "--template", "plain", "--save-every", "1", "--processes", "2"]


def launch(model: Path, folder: Path, steps: int) -> list[str]:
    """The same, started by MLX's own launcher."""
    return training(model, folder, steps)[:-2]


def evaluation(model: Path, folder: Path, items: int) -> list[str]:
    file = rows(folder, items)
    command = ["eval", str(model), "--task", str(file), "--output", str(folder / "report.json")]
    return [*command, "--max-tokens", "100" if items > 100 else "2", "--processes", "2", "--batch-size", "8"]


def study(model: Path, folder: Path, steps: int) -> list[str]:
    train = {"steps": steps, "batch_size": 2, "max_length": 48, "warmup": 0, "save_every": 1}
    grid = [{"method": "lora", "size": {"rank": [2, 4]}}]
    file = study_file(folder, model, train=train, grid=grid, base=False)
    return ["study", str(file), "--output", str(folder / "study"), "--jobs", "2"]


def records(folder: Path) -> bool:
    file = folder / "report.partial.jsonl"
    return file.exists() and file.read_text().count("\n") > 4


LAUNCHERS: dict[str, tuple[Callable[[Path, Path, int], list[str]], int, Callable[[Path], bool]]] = {
    "train": (training, 100_000, lambda folder: any(folder.glob("out/checkpoints/step-*"))),
    "mlx.launch": (launch, 100_000, lambda folder: any(folder.glob("out/checkpoints/step-*"))),
    "eval": (evaluation, 2000, records),
    "study": (
        study,
        100_000,
        lambda folder: len(list(folder.glob("study/cells/*/adapter/checkpoints/step-*"))) > 1,
    ),
}


def _ours(process: psutil.Process) -> bool:
    try:
        return "python" in process.name()
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(params=LAUNCHERS)
def launched(
    request: pytest.FixtureRequest, model: Path, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """A launcher and its two processes, at work."""
    command, size, at_work = LAUNCHERS[request.param]
    launcher = [str(LAUNCH), "-n", "2", "--backend", "ring", "-p", str(free_ports(2)), "--"]
    process = subprocess.Popen(
        [*(launcher if request.param == "mlx.launch" else []), *COMMAND, *command(model, tmp_path, size)],
        stdin=subprocess.PIPE,  # mlx.launch reads it
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not at_work(tmp_path):
            assert process.poll() is None, "it ended"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # not the compiler that MLX may have started at this moment
        yield (
            process,
            [child for child in psutil.Process(process.pid).children(recursive=True) if _ours(child)],
        )
    finally:
        process.kill()
        process.wait()


def test_killing_the_launcher_ends_its_processes(
    launched: tuple[subprocess.Popen[bytes], list[psutil.Process]],
) -> None:
    process, children = launched
    assert len(children) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()
    assert not alive


@pytest.mark.parametrize("name", ["train", "eval", "study"])
def test_a_module_in_the_current_folder_is_not_run(name: str, model: Path, tmp_path: Path) -> None:
    """`python -m` looks there first: a json.py in a downloaded folder was run by every process."""
    here = tmp_path / "downloaded"
    here.mkdir()
    for module in ("json", "mlx", "numpy", "sitecustomize"):
        (here / f"{module}.py").write_text(f"open({str(here / 'ran')!r}, 'a').write({module!r})\n")
    command = LAUNCHERS[name][0](model, tmp_path, 2)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*COMMAND, *command], cwd=here, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not (here / "ran").exists(), (here / "ran").read_text()


def test_an_error_of_the_input_is_told_once(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": 3, "completion": "a"}\n')
    command = [
        "train",
        str(model),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "out"),
        "--processes",
        "2",
    ]
    done = subprocess.run([*COMMAND, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_only_another_process_meets_is_told_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second one may be short of memory where the first is not."""
    code = """
import os, sys
from mlx_adapters.cpu import processes
start = processes.start
def other(module, arguments, **options):
    rank = options["env"]["MLX_RANK"]
    module = "this" if rank == "0" else "mlx_adapters.nothing"
    return start(module, arguments, **options)
processes.start = other
warn = lambda text: print(text, file=sys.stderr)
sys.exit(processes.run_ring("this", [], 2, warn=warn))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "process 1 of 2: " in done.stderr
    assert "mlx_adapters.nothing" in done.stderr
