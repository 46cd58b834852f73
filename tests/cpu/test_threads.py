"""The number of OpenBLAS's threads: measured, lowered where the machine is busy, kept by a resumed run."""

import json
from collections.abc import Callable
from importlib import util
from pathlib import Path

import pytest
from fresh_process import linux, openblas, run
from small_run import config, examples, tiny
from typer.testing import CliRunner

from mlx_adapters import device
from mlx_adapters.cli.app import app
from mlx_adapters.cpu import blas, cores, threads
from mlx_adapters.doctor import doctor
from mlx_adapters.models import load as model
from mlx_adapters.train.loop import Run

IDLE, BUSY = {4: 3.0, 2: 1.8, 1: 1.0}, {4: 0.1, 2: 0.2, 1: 1.0}


class Machine:
    """An OpenBLAS of four threads and what a product's speed is with so many; `asked` counts measurements."""

    def __init__(self) -> None:
        self.used, self.asked = 4, 0
        self.speeds: list[dict[int, float]] = [IDLE]  # one after the other, the last one for good

    def function(self, name: str) -> Callable[..., int]:
        def put(count: int) -> int:
            self.used = count
            return 0

        return {"get_num_threads": lambda: self.used, "set_num_threads": put}[name]

    def rate(self, product: object) -> float:
        if self.used == 1:  # the last of a measurement
            self.asked += 1
            return (self.speeds.pop(0) if len(self.speeds) > 1 else self.speeds[0])[1]
        return self.speeds[0][self.used]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "_function", made.function)
    monkeypatch.setattr(threads, "_product", lambda: None)
    monkeypatch.setattr(threads, "_rate", made.rate)
    monkeypatch.setattr(threads, "most", lambda: 4)
    monkeypatch.setattr(threads, "_EVERY", 0.0)
    return made


def test_a_busy_machine_gets_fewer_threads_and_an_idle_one_all(machine: Machine) -> None:
    assert threads.settle() == 4
    assert threads.in_words() == ""
    machine.speeds = [BUSY]
    assert threads.settle() == 1
    assert "1 of 4 threads" in threads.in_words()
    machine.speeds = [{4: 0.9, 2: 1.8, 1: 1.0}]  # three programs beside it on four cores
    assert threads.settle() == 2
    machine.speeds = [{4: 1.05, 2: 1.02, 1: 1.0}]  # nothing to gain: leave the cores to others
    assert threads.settle() == 1


def test_the_number_follows_the_machine_while_answering(machine: Machine) -> None:
    machine.speeds = [IDLE, BUSY, IDLE]
    assert [threads.keep_up() for _ in range(3)] == [4, 1, 4]


def test_measurements_are_seconds_apart(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    threads.settle()
    monkeypatch.setattr(threads, "_EVERY", 3600.0)
    for _ in range(5):
        threads.keep_up()
    assert machine.asked == 1


def test_a_run_lowers_the_number_once_two_measurements_agree_and_never_raises_it(machine: Machine) -> None:
    machine.speeds = [BUSY, IDLE, BUSY, BUSY, IDLE]
    assert threads.keep_up(4) == 4  # busy for a moment
    assert threads.keep_up(4) == 1
    assert threads.keep_up(1) == 1
    assert threads.keep_up(2) == 2, "two were given: a run that is resumed"


@pytest.mark.parametrize("name", ["OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"])
def test_what_the_user_fixed_is_not_measured(
    name: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "4")
    machine.speeds = [BUSY]
    assert (threads.settle(), threads.keep_up(), threads.keep_up(2), threads.use(1)) == (4, 4, 4, 4)
    assert machine.asked == 0
    assert [f.value for f in doctor() if f.name == "BLAS threads"] == ["4, fixed by the environment"]


def test_a_share_of_the_cores_may_still_be_lowered(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--processes` and `--jobs` set the same variable as a user: the number is the most then."""
    monkeypatch.setattr(cores, "count", lambda: 8)
    for name, value in cores.share(2).items():
        monkeypatch.setenv(name, value)
    machine.speeds = [BUSY]
    assert threads.settle() == 1
    monkeypatch.delenv("MLX_ADAPTERS_THREADS")
    assert threads.fixed()
    assert "MLX_ADAPTERS_THREADS" not in cores.share(2), "the user's own number goes to the processes"


def test_a_run_measures_and_a_resumed_one_has_the_number_that_it_had(
    machine: Machine, tmp_path: Path
) -> None:
    """With another number of threads the last bits of a product differ."""
    machine.speeds = [{4: 1.0, 2: 1.8, 1: 1.0}]
    run = Run(tiny(), examples(), config=config(steps=4, save_every=2), folder=tmp_path)
    assert [step.step for step in run] == [1, 2, 3, 4]
    assert machine.used == 2
    machine.speeds = [IDLE]
    resumed = Run(tiny(), examples(), config=config(steps=4), folder=tmp_path)
    resumed.resume()
    list(resumed)
    assert (machine.used, resumed.progress.threads) == (2, 2)


def test_a_checkpoint_from_before_the_number_was_kept_can_be_resumed(tmp_path: Path) -> None:
    list(Run(tiny(), examples(), config=config(steps=2), folder=tmp_path))
    file = tmp_path / "checkpoints" / "step-000002" / "state.json"
    facts = json.loads(file.read_text())
    del facts["progress"]["threads"]
    file.write_text(json.dumps(facts))
    assert Run(tiny(), examples(), config=config(steps=2), folder=tmp_path).resume() == 2


def test_loading_measures_and_training_tells(
    machine: Machine, folders: dict[str, Path], tmp_path: Path
) -> None:
    machine.speeds = [BUSY]
    model.load(folders["llama"])
    assert machine.used == 1
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "tom", "completion": "7"}) + "\n")
    arguments = ["train", str(folders["llama"]), "--data", str(data), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--steps", "2", "--template", "plain"])
    assert done.stderr.count("OpenBLAS computes with 1 of 4 threads") == 1, done.stderr


def test_doctor_tells_what_the_threads_are_worth(machine: Machine) -> None:
    (found,) = [finding for finding in doctor() if finding.name == "BLAS threads"]
    assert found.value == "4 of 4: 3.0 times as fast as one"
    machine.speeds = [BUSY]
    (found,) = [finding for finding in doctor() if finding.name == "BLAS threads"]
    assert found.value == "1 of 4: other programs keep the cores busy, all would have 10% of the speed"
    assert found.ok


@openblas
def test_the_loaded_library_is_measured_and_set() -> None:
    """In a process whose environment says nothing: as a user's."""
    code = """
import json, os
for name in [name for name in os.environ if name.startswith(("OPENBLAS_", "OMP_"))]:
    del os.environ[name]
import mlx_adapters
from mlx_adapters.cpu import threads
import mlx.core as mx
speeds, before = threads.speeds(), threads.count()
a = mx.ones((70, 300))
sums = [(threads.use(count), (a @ a.T).sum().item()) for count in speeds]
print(json.dumps([before, threads.most(), sums, min(speeds.values()), threads.settle() in speeds]))
"""
    before, most, sums, slowest, chosen = run(code)
    assert before == most
    assert [count for count, _ in sums][-1] == 1
    assert all(total == 70 * 70 * 300 for _, total in sums)
    assert slowest > 0
    assert chosen


@linux
@pytest.mark.skipif(util.find_spec("scipy_openblas32") is None, reason="then another reason is told")
def test_mlx_imported_first_is_told_on_stderr_once() -> None:
    """`import mlx` as the first line of a notebook makes training many times slower."""
    code = """
import contextlib, io, json
import mlx.core
from mlx_adapters.cpu import blas
said = io.StringIO()
with contextlib.redirect_stderr(said):
    blas.warn_if_slow()
    blas.warn_if_slow()
print(json.dumps(said.getvalue()))
"""
    said = run(code)
    assert said.count("\n") == 1
    assert "mlx was imported before mlx_adapters" in said
    assert "import mlx_adapters before mlx" in said
    assert run(code.replace("import mlx.core", "")) == ""
    assert run(code, MLX_ADAPTERS_BLAS="off") == ""
    assert run(code, MLX_ADAPTERS_PROCESSES="2") == "", "the process that started this one tells"


def test_a_slow_blas_is_told_when_a_model_is_loaded(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = blas.Blas("reference", None, "not there", "get it")
    monkeypatch.setattr(blas, "_status", slow)
    monkeypatch.setattr(device, "on_cpu", lambda: True)
    model.load(folders["llama"], lazy=True)
    assert capsys.readouterr().err == "", "it computes nothing yet"
    for _ in range(2):
        model.load(folders["llama"])
    assert capsys.readouterr().err.endswith("(not there): get it\n")
    monkeypatch.setattr(blas, "_warned", False)
