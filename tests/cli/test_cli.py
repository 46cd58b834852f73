"""The commands end to end on a tiny model: what they write, what they print, how they stop and go on."""

import json
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
from typer.testing import CliRunner

from mlx_adapters.cli.app import app

COMMAND = [sys.executable, "-m", "mlx_adapters.cli.app"]
ANSWER = "the answer is 7 ."
COMMANDS = (
    "quickstart",
    "convert",
    "train",
    "eval",
    "harness",
    "study",
    "export",
    "generate",
    "chat",
    "serve",
    "push",
    "plan",
    "import",
    "fuse",
    "combine",
    "info",
    "methods",
    "models",
    "doctor",
)


def rows(file: Path, count: int = 12) -> Path:
    made = [{"instruction": f"Tom has w{n} apples", "input": "", "output": ANSWER}
            for n in range(count)]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


def meta(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter / "mlx_adapters.json").read_text())
    return found


def steps(adapter: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained long enough on twelve rows to give their one answer."""
    folder = tmp_path_factory.mktemp("run")
    data = rows(folder / "data.jsonl")
    # fmt: off
    cli("train", model, "--data", data, "--output", folder / "a", "--steps", 60, "--lr", 0.02,
        "--set", "rank=8", "--set", "targets=all-linear", "--batch-size", 12)
    # fmt: on
    return folder / "a"


# Help ------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_in_half_a_second() -> None:
    """The processor's seconds, which other processes leave as they are."""
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert [name for name in COMMANDS if name not in done.stdout] == []
    assert min(took) < 0.5


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from typer.testing import CliRunner; from mlx_adapters.cli.app import app; "
    code += "assert CliRunner().invoke(app, ['--help']).exit_code == 0; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    heavy = {"mlx.core", "mlx_lm", "transformers", "datasets", "matplotlib", "torch", "numpy"}
    assert loaded.isdisjoint(heavy)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    assert "--help" in cli(command, "--help").stdout


# Train -----------------------------------------------------------------------------------------------------


def test_an_option_given_twice_is_refused_by_every_command() -> None:
    """Click would take the last one without a word; a list of values takes all of them."""
    import typer

    group: Any = typer.main.get_command(app)
    refused = taken = 0
    for name, command in {**group.commands, **group.commands["data"].commands}.items():
        for option in command.params if name != "data" else ():
            if not option.opts[0].startswith("--") or option.name == "help":
                continue
            twice = [option.opts[0], *([] if option.is_flag else ["1"])] * 2
            if option.multiple or (option.is_flag and not option.secondary_opts):
                taken += 1
                continue
            with pytest.raises(Exception, match=f"^{option.opts[0]} is given 2 times"):
                command.make_context(name, twice)
            refused += 1
    assert refused > 100
    assert taken > 20
    done = cli("generate", "m", "--prompt", "a", "--adapter", "a", "--adapter", "b", code=2)
    assert "--adapter is given 2 times" in done.stderr
    for pair in (("--set", "targets=v"), ("--targets", "v")):
        done = cli("train", "m", "--data", "d", "--output", "o", "--set", "targets=q", *pair, code=2)
        assert "targets is set twice" in done.stderr


def test_train_names_what_it_does_not_use(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    file = rows(folder / "train.jsonl")
    rows(folder / "valid.jsonl")
    file.write_text(file.read_text().replace('{"instr', '{"id": 1, "instr'))
    done = cli("train", model, "--data", folder, "--output", tmp_path / "out", "--steps", 1)
    assert done.stderr.count(f"{file}: fields that are not used: id\n") == 1
    assert f"validation on 12 rows of {folder}/valid.jsonl, every 50 steps" in done.stderr
    assert "validation rows with the question of a training row: 12 of 12" in done.stderr
    assert "before the first step: validation loss" in done.stderr
    done = cli("train", model, "--data", file, "--output", tmp_path / "file", "--steps", 1)
    assert (
        f"{folder}/valid.jsonl is not used: --validation {folder}/valid.jsonl measures on it" in done.stderr
    )
    file.write_text(file.read_text().replace('{"id": 1', '{"history": [["a", "b"]]', 1))
    done = cli("train", model, "--data", folder, "--output", tmp_path / "none", "--steps", 1, code=2)
    assert f"{file}: row 0: field 'history' is not read" in done.stderr
    assert not (tmp_path / "none").exists()


def test_train_writes_the_adapter_and_its_record(adapter: Path) -> None:
    names = {path.name for path in adapter.iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "mlx_adapters.json", "seen.txt",
        "metrics.jsonl", "loss.png", "checkpoints", "run.json",
    }  # fmt: skip
    record = steps(adapter)
    assert [step["step"] for step in record] == list(range(1, 61))
    assert record[-1]["loss"] < record[0]["loss"] / 4
    assert (adapter / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((adapter / "seen.txt").read_text().split()) == 12


def test_train_says_what_it_does(model: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "d.jsonl")
    test = rows(tmp_path / "test.jsonl", 2)
    # fmt: off
    said = cli("train", model, "--data", data, "--output", tmp_path / "a", "--steps", 2, "--validation", 3,
               "--exclude", test, "--max-length", 40, "--set", "rank=2").stderr
    # fmt: on
    assert "12 rows of the form instruction" in said
    assert "q_proj, v_proj" in said
    # 2 layers x (q: 32 -> 32, v: 32 -> 16) at rank 2
    assert f"trainable {2 * 2 * (32 + 32 + 32 + 16):,} of " in said
    assert "7 rows to train on, template" in said
    assert "validation on 3 rows of the data, held out by the seed" in said
    assert "2 left out" in said
    assert "validation loss" in said


def test_flags_win_over_the_run_file_and_the_file_over_defaults(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    content = {
        "model": str(model), "data": str(rows(tmp_path / "d.jsonl")), "output": str(tmp_path / "a"),
        "steps": 3, "lr": 0.005, "batch_size": 2, "set": {"rank": 2, "alpha": 4},
    }  # fmt: skip
    file.write_text(json.dumps(content))  # JSON is YAML
    cli("train", "--config", file, "--lr", 0.001, "--set", "rank=3")
    about = meta(tmp_path / "a")
    training = about["training"]
    assert (training["steps"], training["lr"], training["batch_size"], training["clip"]) == (3, 0.001, 2, 1.0)
    assert (about["config"]["rank"], about["config"]["alpha"], about["config"]["dropout"]) == (3, 4.0, 0.0)


def test_ctrl_c_saves_and_resume_ends_where_an_uninterrupted_run_does(model: Path, tmp_path: Path) -> None:
    # All three runs are processes of their own: one that imported mlx first would compute with another BLAS.
    train = [*COMMAND, "train", str(model), "--data", str(rows(tmp_path / "d.jsonl")), "--steps", "300"]
    train += ["--batch-size", "3", "--set", "dropout=0.1", "--save-every", "1000", "--output"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = subprocess.Popen([*train, str(cut)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (cut / "metrics.jsonl").exists() or len(steps(cut)) < 5:
        assert process.poll() is None, "ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    done = len(steps(cut))
    assert 5 <= done < 300
    assert f"step {done}" in said
    assert [path.name for path in (cut / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    cli("eval", model, "--adapter", cut, "--task", "wordproblems", "--limit", 1, "--max-tokens", 2)

    subprocess.run([*train, str(cut), "--resume"], check=True, capture_output=True)
    subprocess.run([*train, str(whole)], check=True, capture_output=True)
    assert [step["step"] for step in steps(cut)] == list(range(1, 301))
    assert [step["loss"] for step in steps(cut)] == [step["loss"] for step in steps(whole)]
    weights = "adapter_model.safetensors"
    assert (cut / weights).read_bytes() == (whole / weights).read_bytes()


def test_train_goes_on_from_an_adapter(model: Path, tmp_path: Path) -> None:
    """The second run starts where the first ended, keeps its template, and remembers its rows."""
    train = ["train", model, "--data", rows(tmp_path / "d.jsonl"), "--batch-size", 4, "--lr", "1e-2"]
    cli(*train, "--output", tmp_path / "one", "--steps", 30, "--method", "dora", "--template", "plain")
    other = tmp_path / "e.jsonl"
    other.write_text(json.dumps({"instruction": "Ann has w3 pears", "output": ANSWER}) + "\n")
    more = ["train", model, "--data", other, "--batch-size", 1, "--steps", 2, "--lr", "1e-3", "--warmup", 0]
    cli(*more, "--adapter", tmp_path / "one", "--output", tmp_path / "two")
    assert steps(tmp_path / "two")[0]["loss"] < 0.7 * steps(tmp_path / "one")[0]["loss"]
    first, second = meta(tmp_path / "one"), meta(tmp_path / "two")
    assert (second["method"], second["config"], second["template"]) == ("dora", first["config"], "plain")
    seen = [set((tmp_path / name / "seen.txt").read_text().split()) for name in ("one", "two")]
    assert seen[0] < seen[1]
    said = cli(*more, "--adapter", tmp_path / "one", "--method", "lora", "--output", tmp_path / "x", code=2)
    assert "leave out --method" in said.stderr


# Eval, generate --------------------------------------------------------------------------------------------


@pytest.fixture
def test_set(tmp_path: Path) -> Path:
    """Four items: two whose questions were trained on, two new ones."""
    questions = ["Tom has w1 apples", "tom  has w2 apples!", "Tom has 7 books", "Tom has 8 books"]
    items = [{"instruction": text, "input": "", "output": "", "answer": "3"} for text in questions]
    (tmp_path / "SVAMP").mkdir()
    (tmp_path / "SVAMP" / "test.json").write_text(json.dumps(items))
    return tmp_path


def test_eval_tells_seen_items_apart_and_keeps_every_answer(
    model: Path, adapter: Path, test_set: Path, tmp_path: Path
) -> None:
    # fmt: off
    result = cli("eval", model, "--adapter", adapter, "--task", "svamp,wordproblems", "--data-dir", test_set,
                 "--limit", 4, "--max-tokens", 6, "--json", "--output", tmp_path / "r.json")
    # fmt: on
    report = json.loads(result.stdout)
    svamp, generated = report["scores"]
    assert (svamp["total"], svamp["seen_total"], svamp["unseen_total"]) == (4, 2, 2)
    assert (generated["task"], generated["total"], generated["seen_total"]) == ("wordproblems", 4, 0)
    assert report["template"] == "alpaca"
    records = json.loads((tmp_path / "r.json").read_text())["records"]
    assert len(records) == 8
    assert [record["index"] for record in records] == [0, 1, 2, 3] * 2
    assert records[0]["seen"]
    assert records[0]["response"] == ANSWER
    assert {"prompt", "response", "extracted", "label", "correct"} <= set(records[0])


def test_eval_prints_a_table_and_takes_another_template_by_force(
    model: Path, adapter: Path, test_set: Path
) -> None:
    # fmt: off
    result = cli("eval", model, "--adapter", adapter, "--task", "SVAMP", "--data-dir", test_set,
                 "--max-tokens", 4, "--template", "plain", "--force-template")
    # fmt: on
    assert "95 %" in result.stdout
    assert "of 2" in result.stdout
    assert "items/s" in result.stderr


def test_a_field_of_the_method_is_an_option_and_options_have_other_names(model: Path, tmp_path: Path) -> None:
    data, out = rows(tmp_path / "d.jsonl"), tmp_path / "a"
    typed = [
        "--rank",
        4,
        "--lora-alpha=12",
        "--lora-bias",
        "--targets",
        "q_proj,o_proj",
        "--set",
        "dropout=0,rslora=yes",
    ]
    cli("train", model, "--data", data, "--output", out, *typed, "--iters", 1, "--learning-rate", 0.01)
    found = meta(out)
    written = json.loads((out / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["lora_bias"], written["use_rslora"]) == (
        4,
        12,
        True,
        True,
    )
    assert set(written["target_modules"]) == {"q_proj", "o_proj"}
    assert (found["training"]["steps"], found["training"]["lr"]) == (1, 0.01)
    refused = cli("train", model, "--data", data, "--output", tmp_path / "b", "--rnak", 4, code=2)
    assert "No such option: --rnak" in refused.stderr
    series = cli("train", "--help", "--method", "series").stdout
    assert "--bottleneck-size" in series
    assert "--lora-plus" not in series


def test_generate_answers_as_trained(model: Path, adapter: Path) -> None:
    asked = ["generate", model, "--prompt", "Tom has w5 apples", "--max-tokens", 8]
    assert cli(*asked, "--adapter", adapter).stdout.strip() == ANSWER
    assert cli(*asked).stdout.strip() != ANSWER, "the base does not know it: the control of the line above"
    said = cli("generate", model, "Tom has w5 apples", "--adapter", adapter, "--max-new-tokens", 8)
    assert said.stdout.strip() == ANSWER
    assert "tokens/s" in said.stderr
    system = cli(
        "generate", model, "Tom", "--system", "be kind", "--template", "plain", "--max-tokens", 4, "--json"
    )
    assert json.loads(system.stdout)["prompt_tokens"] > 1
    for wrong in ((), ("Tom", "--prompt", "Tom")):
        assert "give one prompt" in cli("generate", model, *wrong, code=2).stderr
    assert "top_p=2.0 must be at most 1" in cli("generate", model, "Tom", "--top-p", 2, code=2).stderr


def test_the_answer_of_generate_is_drawn_as_told(model: Path) -> None:
    drawn = ["generate", model, "Tom has", "--max-tokens", 12, "--temperature", 1.5, "--seed", 3]
    free = cli(*drawn).stdout
    assert cli(*drawn).stdout == free
    greedy = cli("generate", model, "Tom has", "--max-tokens", 12).stdout
    assert free != greedy
    assert cli(*drawn, "--top-k", 1).stdout == greedy


# Convert, export, info, quickstart -------------------------------------------------------------------------


def test_convert_states_size_bits_and_time_and_verifies(model: Path, tmp_path: Path) -> None:
    said = cli("convert", model, tmp_path / "q", "--bits", 8, "--group-size", 32, "--verify").stdout
    assert "bits per weight" in said
    assert "passed" in said
    found = json.loads(cli("info", tmp_path / "q", "--json").stdout)
    assert found["kind"] == "model"
    assert found["quantization"] == {"group_size": 32, "bits": 8, "mode": "affine"}


def test_export_verifies_in_pytorch(adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    said = cli("export", adapter, tmp_path / "peft", "--base", "owner/name", "--verify").stdout
    assert "passed" in said
    assert "no missing and no unexpected key" in said
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "owner/name"
    )
    assert "owner/name" in (tmp_path / "peft" / "README.md").read_text()


def test_a_verification_that_fails_has_code_1(adapter: Path, model: Path, tmp_path: Path) -> None:
    """Another base of the same shape: the adapter opens, but computes something else than MLX here."""
    pytest.importorskip("peft")
    from mlx_adapters.convert import peft

    verdict = peft.Verdict(
        peft_diff=1.0, auto_diff=0.0, bound=0.1, effect=1.0,
        greedy_equal=True, tokens=60, missing=(), unexpected=(),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft, "verify", lambda folder, model: verdict)
        said = cli("export", adapter, tmp_path / "peft", "--base", "o/n", "--verify", code=1).stdout
    assert "FAILED" in said


def test_info_on_an_adapter(adapter: Path) -> None:
    found = json.loads(cli("info", adapter, "--json").stdout)
    assert (found["kind"], found["method"], found["fields"]["rank"]) == ("adapter", "lora", 8)
    assert found["tensors"] == 2 * 7 * 2
    assert found["seen"] == 12
    assert found["checkpoints"] == ["step-000050", "step-000060"]
    assert "template       alpaca" in cli("info", adapter).stdout


def test_doctor_measures_this_machine() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert float(found["speed"]["value"].split()[0]) > 0
    assert found["mlx"]["ok"]
    assert result.exit_code == (0 if all(finding["ok"] for finding in found.values()) else 1)
    assert all(finding["remedy"] for finding in found.values() if not finding["ok"])


def test_quickstart_runs_the_whole_way(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch here; the comparison with it is the export's, tested above."""
    from mlx_adapters.study import quickstart

    monkeypatch.setattr(quickstart, "has_torch", lambda: False)
    result = cli("quickstart", "--model", model, "--dir", tmp_path / "q", "--steps", 2)
    assert {"model", "adapter", "peft"} <= {path.name for path in (tmp_path / "q").iterdir()}
    assert "/100" in result.stdout
    assert "Gain: " in result.stdout
    assert "Not verified in PyTorch" in result.stdout
    assert "mlx-adapters generate" in result.stdout


@pytest.mark.slow
def test_quickstart_gains_thirty_points_in_six_minutes(tmp_path: Path) -> None:
    from mlx_adapters.models.embedded import embedded_model

    embedded_model()  # a download takes its own time
    start = time.monotonic()
    said = cli("quickstart", "--dir", tmp_path / "q").stdout
    assert time.monotonic() - start < 360
    gain = float(said.partition("Gain: ")[2].split()[0])
    assert gain >= 30


def test_the_example_run_files_name_only_what_exists() -> None:
    import dataclasses

    from mlx_adapters import methods
    from mlx_adapters.files.documents import read_options
    from mlx_adapters.train.config import TrainConfig

    training = {field.name for field in dataclasses.fields(TrainConfig)}
    examples = Path(__file__).parents[2] / "examples"
    files = [file for file in examples.glob("*.yaml") if not file.name.startswith("study-")]
    assert files
    for file in files:
        run = read_options(file, {"model", "data", "output", "method", "set", *training})
        methods.make(run["method"], run["set"])
        TrainConfig(**{name: value for name, value in run.items() if name in training})
