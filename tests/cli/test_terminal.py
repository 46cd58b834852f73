"""On a pseudo-terminal: notes beside a progress bar, Ctrl-C during native code, a terminal that is closed;
and a reader of the output who has gone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from terminal import Terminal, shown
from tiny import make_tiny

COMMAND = [sys.executable, "-m", "mlx_adapters.cli.app"]
# What a step of training is on a busy machine: native code for seconds, which Ctrl-C does not end.
SLOW = """
import hashlib, sys, time
from mlx_adapters.cli.app import main
from mlx_adapters.train.loop import Run
step = Run._step
def slow(self, *arguments):
    if self.step == 1:
        print("native", file=sys.stderr)
        hashlib.pbkdf2_hmac("sha256", b"", b"", {rounds})
        print("rounds are done", file=sys.stderr)
        time.sleep(0.3)
    return step(self, *arguments)
Run._step = slow
sys.argv[0] = "mlx-adapters"
main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def training(model: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run of 100,000 steps."""
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"tom has {n} apples", "completion": f"the answer is {n % 7}"} for n in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["train", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    command += ["--template", "plain", "--batch-size", "3", "--save-every", "100000"]
    return [*command, "--steps", "100000"]


def saved(output: Path) -> int:
    """The step of the only checkpoint, whose adapter is there too."""
    assert (output / "adapter_model.safetensors").exists()
    (folder,) = (output / "checkpoints").iterdir()
    return int(folder.name.removeprefix("step-"))


def test_a_terminal_is_shown_as_it_is() -> None:
    assert shown("a\r\nbar 1\r\x1b[2Knote\r\nbar 2\r\x1b[1A\x1b[2Know\x1b[31m!\x1b[0m") == [
        "a",
        "now!",
        "bar 2",
    ]


def test_notes_stand_above_the_bar_and_an_error_below() -> None:
    """They were written on the bar's line: "284 MB 0:00:03s / tep 3: validation loss"."""
    code = """
import sys, time, warnings
from mlx_adapters.screen import complain, lines, say, track
with lines("train", 3) as update:
    for step in (1, 2, 3):
        update(step, f"loss {step}")
        time.sleep(0.15)
        say(f"step {step}: a note")
        print(f"step {step}: a library's", file=sys.stderr)
say("between")
for number in track("plan", range(9), 9, str):
    time.sleep(0.15)
    if number == 2:
        complain("interrupted")
        break
"""
    with Terminal([sys.executable, "-c", code]) as terminal:
        assert terminal.end() == 0
    lines = [line for line in shown(terminal.text) if line]
    notes = [f"step {step}: {what}" for step in (1, 2, 3) for what in ("a note", "a library's")]
    assert lines[:6] == notes
    assert lines[6].startswith("train ")
    assert "3/3 loss 3" in lines[6]
    assert lines[7] == "between"
    assert lines[8].startswith("plan ")
    assert lines[9:] == ["error: interrupted"]


def test_tables_fit_eighty_columns_and_cut_no_name() -> None:
    from mlx_adapters import methods
    from mlx_adapters.models.architectures.table import with_layers

    for command, names in (("methods", methods.names()), ("models", with_layers()), ("doctor", ["mlx-lm"])):
        with Terminal([sys.executable, "-m", "mlx_adapters.cli.app", command], columns=80) as terminal:
            terminal.end()
        links = re.findall("\x1b\\]8;[^;]*;([^\x1b]+)", terminal.text)
        assert bool(links) == (command == "methods"), "papers are links"
        lines = shown(re.sub("\x1b\\]8;[^\x1b]*\x1b\\\\", "", terminal.text))
        rule = next(index for index, line in enumerate(lines) if "────" in line)
        drawn = lines[: lines.index("", rule)]
        assert max(map(len, drawn)) <= 80
        assert {*names} <= {word for line in drawn for word in line.split()}
        assert not any("…" in line for line in drawn)


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGHUP twice"])
def test_ctrl_c_is_answered_at_once_while_native_code_computes(
    how: str, training: list[str], tmp_path: Path
) -> None:
    code = SLOW.format(rounds=12_000_000)
    with Terminal([sys.executable, "-c", code, *training]) as terminal:
        terminal.wait_for("native")
        time.sleep(0.3)
        at, pressed = len(terminal.text), time.monotonic()
        if how == "Ctrl-C":
            terminal.press(b"\x03")
        elif how == "SIGTERM":
            terminal.process.send_signal(signal.SIGTERM)
        else:  # where a terminal is closed, its shell and the system both send one
            terminal.process.send_signal(signal.SIGHUP)
        terminal.wait_for("stopping after this step ...", since=at)
        answered = time.monotonic() - pressed
        if how == "SIGHUP twice":
            terminal.wait_for("rounds are done", since=at)
            terminal.process.send_signal(signal.SIGHUP)
        assert terminal.end() == 130
        ended = time.monotonic() - pressed
    assert answered < 0.3 or answered < ended / 4, (answered, ended)
    assert terminal.text.count("stopping after this step") == 1
    assert saved(tmp_path / "out") == 2
    assert "interrupted at step 2: saved in" in " ".join(shown(terminal.text))


def test_a_closed_terminal_saves(training: list[str], tmp_path: Path) -> None:
    """SIGHUP: and whatever is written to a terminal that is gone is an error."""
    with Terminal([*COMMAND, *training]) as terminal:
        terminal.wait_for("tokens/s")  # a step: "loss on" is said before
        terminal.close()
        assert terminal.process.wait(timeout=60) == 130
    step = saved(tmp_path / "out")
    assert (tmp_path / "out" / "metrics.jsonl").read_text().count('"step"') == step


def test_a_run_that_nohup_started_goes_on_when_the_terminal_is_closed(
    training: list[str], tmp_path: Path
) -> None:
    training[training.index("--steps") + 1] = "30"
    code = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); sys.argv[0] = 'mlx-adapters'; "
    code += "from mlx_adapters.cli.app import main; main()"
    with Terminal([sys.executable, "-c", code, *training]) as terminal:
        terminal.wait_for("tokens/s")  # a step: "loss on" is said before
        terminal.close()
        assert terminal.process.wait(timeout=60) >= 0  # its result could not be printed
    assert saved(tmp_path / "out") == 30


def test_a_reader_who_leaves_does_not_end_the_run(training: list[str], tmp_path: Path) -> None:
    """`train ... 2>&1 | head -1` ended with exit 0 and no adapter."""
    training[training.index("--steps") + 1] = "30"
    process = subprocess.Popen([*COMMAND, *training], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert saved(tmp_path / "out") == 30
    assert (tmp_path / "out" / "loss.png").exists()


@pytest.mark.parametrize("command", ["methods", "methods --json", "info MODEL"])
def test_a_reader_who_leaves_before_the_result_is_no_error(command: str, model: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [str(model) if word == "MODEL" else word for word in command.split()]
    done = subprocess.run([*COMMAND, *words], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_pipe_that_breaks_elsewhere_is_an_error() -> None:
    """Only a reader of the result who has gone is no error."""
    code = """
import sys
from mlx_adapters.cli import info
from mlx_adapters.cli.app import main
def broken(*_):
    raise BrokenPipeError(32, "Broken pipe")
sys.argv = ["mlx-adapters", "methods"]
import mlx_adapters.cli.methods as methods
methods.report = broken
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stderr) == (2, "error: Broken pipe\n")
