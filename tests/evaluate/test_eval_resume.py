"""An interrupted evaluation goes on from its records and ends as an uninterrupted one."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import cli
from tiny import make_tiny

from mlx_adapters import device
from mlx_adapters.cpu import cores, threads
from mlx_adapters.errors import OutputError, UnsupportedError
from mlx_adapters.evaluate import ask, tasks
from mlx_adapters.evaluate.ask import Asking
from mlx_adapters.evaluate.records import RecordFile
from mlx_adapters.evaluate.workers import Workers, processes_for

COMMAND = [sys.executable, "-m", "mlx_adapters.cli.app"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    form = "\n\nAnswer1: apples Answer2: 7 more\n\nAnswer format: answer1/answer2"
    for name, end, answer in (("SVAMP", "", "7"), ("boolq", "", "true"), ("ARC-Easy", form, "answer1")):
        rows = [
            {"instruction": f"tom has w{n} apples and {name}{end}", "input": "", "answer": answer}
            for n in range(24)
        ]
        (folder / name).mkdir()
        (folder / name / "test.json").write_text(json.dumps(rows))
    return folder


def report(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Ctrl-C while item `count` is being answered."""
    whole, left = ask.generate_texts, count

    def generate(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        for one in whole(*arguments, **options):
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            yield one

    monkeypatch.setattr(ask, "generate_texts", generate)


def test_an_interrupted_evaluation_ends_as_an_uninterrupted_one(
    model: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["eval", model, "--task", "SVAMP,boolq", "--data-dir", sets, "--max-tokens", 6, "--batch-size", 4]
    cli(*run, "--output", tmp_path / "whole.json")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 30)
        said = cli(*run, "--output", tmp_path / "cut.json", code=130)
    assert "6 of 24 items of boolq, in" in said.stderr
    assert not (tmp_path / "cut.json").exists()
    lines = (tmp_path / "cut.partial.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 30
    assert {json.loads(line)["task"] for line in lines[1:]} == {"SVAMP", "boolq"}

    answered = 0
    whole = ask.generate_texts

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal answered
        for one in whole(*arguments, **options):
            answered += 1
            yield one

    monkeypatch.setattr(ask, "generate_texts", counting)
    said = cli(*run, "--output", tmp_path / "cut.json", "--resume")
    assert answered == 48 - 30
    assert "SVAMP: 24 of 24 items done already" in said.stderr
    assert report(tmp_path / "cut.json") == report(tmp_path / "whole.json")
    assert not (tmp_path / "cut.partial.jsonl").exists()


@pytest.mark.parametrize("decoding", ["beam", "sample", "likelihood"])
def test_other_decodings_go_on_too(model: Path, sets: Path, tmp_path: Path, decoding: str) -> None:
    run = ["eval", model, "--task", "ARC-Easy", "--data-dir", sets, "--max-tokens", 4, "--decoding", decoding]
    run += ["--temperature", 1.5, "--top-p", 1.0, "--choices", "text"]
    cli(*run, "--output", tmp_path / "whole.json")
    kept = report(tmp_path / "whole.json")
    head = {key: value for key, value in kept.items() if key not in ("records", "scores")}
    lines = [head, *kept["records"][3:17]]
    (tmp_path / "cut.partial.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cli(*run, "--output", tmp_path / "cut.json", "--resume")
    again = report(tmp_path / "cut.json")
    if decoding == "likelihood":  # sums in another order
        for one, other in zip(kept["records"], again["records"], strict=True):
            assert one.pop("loglikelihoods") == pytest.approx(other.pop("loglikelihoods"), abs=1e-4)
    assert again == kept


def test_a_killed_process_leaves_records_to_go_on_from(model: Path, sets: Path, tmp_path: Path) -> None:
    run = ["eval", str(model), "--task", "SVAMP", "--data-dir", str(sets), "--max-tokens", "200"]
    run += ["--batch-size", "1", "--output", str(tmp_path / "r.json")]
    process = subprocess.Popen([*COMMAND, *run], stderr=subprocess.DEVNULL)
    file, deadline = tmp_path / "r.partial.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and len(file.read_text().splitlines()) > 3:
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = file.read_text()
    file.write_text(kept + '{"task": "SVAMP", "ind')  # as if the last line had been cut short
    cli(*run, "--resume")
    records = report(tmp_path / "r.json")["records"]
    assert [record["index"] for record in records] == list(range(24))
    for line in kept.splitlines()[1:]:
        assert json.loads(line) in records


def test_going_on_does_not_write_the_records_again(tmp_path: Path) -> None:
    """The file was emptied and written anew: what stopped that halfway, a kill, say, lost answers.

    Here the system stops it: it refuses files of over a thousand bytes.
    """
    record = {"task": "SVAMP", "index": 0, "item": "a" * 16, "correct": True, "label": "7"}
    record |= {"prompt": "p", "response": "7", "extracted": "7"}
    lines = [json.dumps({"model": "m"})] + [json.dumps(record | {"index": n}) for n in range(100)]
    file = tmp_path / "report.partial.jsonl"
    file.write_text("\n".join(lines) + "\n" + '{"task": "SV')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with (
            contextlib.suppress(OutputError),
            RecordFile(tmp_path / "report.json", {"model": "m"}, resume=True),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_text().split("\n") == [*lines, ""]


def test_an_interrupted_evaluation_can_be_compared(
    model: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["eval", model, "--task", "SVAMP", "--data-dir", sets, "--max-tokens", 2]
    interrupt_after(monkeypatch, 8)
    cli(*run, "--output", tmp_path / "a.json", code=130)
    said = cli("compare", tmp_path / "a.partial.jsonl", tmp_path / "a.partial.jsonl").stdout
    assert "on the same 8 items" in said


def test_records_are_not_mixed_up(model: Path, sets: Path, tmp_path: Path) -> None:
    run = ["eval", model, "--task", "SVAMP", "--data-dir", sets, "--max-tokens", 2, "--output"]
    out = tmp_path / "r.json"
    cli(*run, out)
    assert "exists. Choose another --output" in cli(*run, out, code=2).output
    assert "exists. Choose another --output" in cli(*run, out, "--resume", code=2).output

    kept = report(out)
    head = {key: value for key, value in kept.items() if key not in ("records", "scores")}
    lines = [json.dumps(line) + "\n" for line in (head, *kept["records"][:5])]
    out.unlink()
    out.with_suffix(".partial.jsonl").write_text("".join(lines))
    assert "Go on with --resume" in cli(*run, out, code=2).output
    said = cli(*run, out, "--resume", "--template", "plain", "--seed", 3, code=2).output
    assert "was made with another seed 0, now 3; template 'alpaca', now 'plain'" in said

    changed = json.loads(lines[2]) | {"item": "0" * 16}
    out.with_suffix(".partial.jsonl").write_text("".join([*lines[:2], json.dumps(changed) + "\n"]))
    assert "item 1 of SVAMP is another question now" in cli(*run, out, "--resume", code=2).output
    out.with_suffix(".partial.jsonl").write_text("".join([*lines[:2], "{}\n"]))
    assert "r.partial.jsonl:3: is not a record" in cli(*run, out, "--resume", code=2).output
    out.with_suffix(".partial.jsonl").write_text("")  # killed before the first line
    cli(*run, out, "--resume")
    assert report(out) == kept


def test_the_report_may_be_named_as_the_test_file(model: Path, tmp_path: Path) -> None:
    """test.json beside test.jsonl: the growing records must not be taken for it, nor it for them."""
    file = tmp_path / "test.jsonl"
    file.write_text('{"question": "How many?", "answer": "3"}\n')
    before = file.read_bytes()
    cli("eval", model, "--task", file, "--max-tokens", 2, "--output", tmp_path / "test.json")
    assert len(report(tmp_path / "test.json")["records"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.json", "test.jsonl"]
    assert file.read_bytes() == before


def test_resume_needs_an_output(model: Path) -> None:
    said = cli("eval", model, "--task", "wordproblems", "--resume", code=2).output
    assert "give the same --output" in said


@pytest.mark.parametrize("decoding", ["greedy", "beam", "sample", "likelihood"])
def test_processes_share_the_items_and_give_the_records_of_one(
    decoding: str, model: Path, sets: Path, tmp_path: Path
) -> None:
    names = "ARC-Easy" if decoding == "likelihood" else "SVAMP,boolq"
    run = ["eval", model, "--task", names, "--data-dir", sets, "--limit", 9, "--decoding", decoding]
    run += ["--batch-size", 4, "--max-tokens", 6]
    run += ["--choices", "text"]  # the tiny tokenizer tells no labels apart
    cli(*run, "--output", tmp_path / "one.json")
    cli(*run, "--processes", 2, "--output", tmp_path / "two.json")
    one, two = report(tmp_path / "one.json"), report(tmp_path / "two.json")
    for record in one["records"]:  # other batches round otherwise
        record["loglikelihoods"] = pytest.approx(record["loglikelihoods"], abs=5e-5)
    assert two == one


def test_what_a_process_meets_is_told_in_one_line(sets: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    said = cli("eval", broken, "--task", "SVAMP", "--data-dir", sets, "--processes", 2, code=2).stderr
    assert said.startswith("error: ")
    assert "broken/config.json" in said
    assert said.count("\n") == 1


def test_a_process_that_dies_ends_the_evaluation_with_a_message(model: Path, sets: Path) -> None:
    ((task, items),) = tasks.load("SVAMP", data_dir=sets)
    with Workers(model, None, 2) as workers:
        os.kill(workers._processes[1].pid, signal.SIGKILL)
        with pytest.raises(UnsupportedError, match=r"process 1 of 2 ended .signal 9"):
            list(workers.answer(task, items, Asking(template="alpaca", max_tokens=6)))


def test_two_processes_are_the_default_where_they_pay(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"on_cpu": True, "count": 2, "limited": False, "free_memory": 1 << 34}
    for module, name in ((device, "on_cpu"), (cores, "count"), (cores, "limited"), (device, "free_memory")):
        monkeypatch.setattr(module, name, lambda name=name: facts[name])
    useful = [2]  # threads
    monkeypatch.setattr(threads, "most", lambda: 2)
    monkeypatch.setattr(threads, "settle", lambda: useful[0])
    assert processes_for(model, 128) == 2
    assert processes_for(model, 127) == 1
    size = sum(file.stat().st_size for file in model.glob("model*.safetensors"))
    for name, other in (("on_cpu", False), ("count", 1), ("limited", True), ("free_memory", 4 * size)):
        with monkeypatch.context() as changed:
            changed.setitem(facts, name, other)
            assert processes_for(model, 128) == 1
    useful[0] = 1  # other programs keep the second core busy
    assert processes_for(model, 128) == 1


def test_what_eval_chose_is_said_and_can_be_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "settle", lambda: 2)  # an idle machine
    run = ["eval", model, "--task", "wordproblems", "--limit", 128, "--max-tokens", 1]
    one = cli(*run, "--processes", 1, "--output", tmp_path / "one.json")
    two = cli(*run, "--output", tmp_path / "two.json")
    assert "processes answer" not in one.output
    assert ("2 processes answer" in two.output) == (device.on_cpu() and cores.count() > 1)
    assert report(tmp_path / "one.json") == report(tmp_path / "two.json")
