"""What comes next: the lines that commands end with are read by the program itself."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from spoken import make_speaker
from tiny import make_tiny
from typer.main import get_command
from typer.testing import CliRunner

from mlx_adapters import next_steps
from mlx_adapters.cli.app import app

ROWS = [{"question": "tom has 3", "answer": "3"}, {"question": "how many's it?\n", "answer": "2"}] * 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that chats, and data whose paths a shell would take apart."""
    root = tmp_path_factory.mktemp("it's next")
    make_tiny("llama", root, vocab_size=320).rename(root / "a model")
    make_speaker("Qwen2.5", root / "a model")
    (root / "my data").mkdir()
    (root / "my data" / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (root / "my data" / "test.jsonl").write_text(json.dumps({"question": "tom has 3", "answer": "3"}))
    return root


def run(*arguments: Any) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def lines(output: str) -> list[list[str]]:
    """The commands behind `Next:`, as a shell takes them apart; each is parsed by the program."""
    found = [shlex.split(line) for line in output.partition("Next:\n")[2].splitlines() if line.strip()]
    for program, *words in found:
        assert program == "mlx-adapters"
        parses(words)
    return [words[1:] for words in found]


def parses(words: list[str]) -> None:
    """Raise what the program would say of these arguments; nothing is run."""
    command: Any = get_command(app)
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    command.make_context(command.name, list(words), resilient_parsing=False)


def test_a_line_that_is_wrong_is_told_from_one_that_is_right() -> None:
    parses(["train", "a", "--data", "b", "--output", "c"])
    with pytest.raises(Exception, match="No such option"):
        parses(["train", "a", "--dat", "b"])
    with pytest.raises(Exception, match="Missing"):
        parses(["eval", "a"])


def test_training_and_measuring_end_with_lines_that_run(root: Path, tmp_path: Path) -> None:
    model, data, adapter = root / "a model", root / "my data", tmp_path / "an adapter"
    output = run("train", model, "--data", data, "--output", adapter, "--steps", 1, "--show-example")
    assert "tom has 3<|im_end|>\n<|im_start|>assistant\n⟦3<|im_end|>⟧" in output
    assert "⟦ ⟧ is learned" in output
    found = lines(output)
    assert [words[0] for words in found] == ["eval", "generate", "chat", "export"]
    assert found[0][1:] == [str(model), "--adapter", str(adapter), "--task", str(data / "test.jsonl")]
    assert found[1][-2:] == ["--prompt", "tom has 3"]
    assert run(*found[1], "--max-tokens", 2)
    report = tmp_path / "my report.json"
    after = lines(run(*found[0], "--output", report, "--max-tokens", 2))
    assert [words[0] for words in after] == ["eval", "compare", "export"]
    run(*after[0], "--max-tokens", 2)
    run(*after[1])
    text = run(*found[3][:3], "--base", "someone/some-model")
    python = text.partition("In Python:\n")[2]
    compile(python, "exported", "exec")
    assert f'"{found[3][2]}"' in python
    assert '"someone/some-model"' in python


def test_sets_of_the_paper_are_measured_by_the_papers_tasks(root: Path, tmp_path: Path) -> None:
    from mlx_adapters.adapter.meta import AdapterMeta
    from mlx_adapters.data.sources import rows_from_list
    from mlx_adapters.methods import LoRA

    rows, meta = rows_from_list([dict(row) for row in ROWS]), AdapterMeta(method=LoRA(), base={})
    place = tmp_path / "LLM-Adapters"
    (place / "dataset" / "SVAMP").mkdir(parents=True)
    (place / "dataset" / "SVAMP" / "test.json").write_text("[]")
    for data, task, more in (
        ("math_10k", "math", []),
        ("commonsense_170k", "commonsense", []),
        ("wordproblems", "wordproblems", []),
        (str(place / "math_10k.json"), "math", ["--data-dir", str(place / "dataset")]),
    ):
        found = next_steps.after_train("m", data, rows, Path("out"), meta)
        assert shlex.split(found[0]) == [
            *("mlx-adapters", "eval", "m", "--adapter", "out", "--task", task), *more
        ]  # fmt: skip
        assert [shlex.split(line)[1] for line in found] == ["eval", "export"]
        for line in found:
            parses(shlex.split(line)[1:])
    assert "generate" in next_steps.after_train("m", "alpaca", rows, Path("out"), meta)[0]


def test_the_other_commands_lines_are_commands() -> None:
    from mlx_adapters.adapter.meta import AdapterMeta
    from mlx_adapters.methods import LoRA

    folder = Path("it's a folder")
    for line in (
        *next_steps.after_convert(folder),
        *next_steps.after_fuse(folder),
        *next_steps.after_statistics(str(folder), "m"),
        *next_steps.after_adapter(folder, None, AdapterMeta(method=LoRA(), base={})),
        *next_steps.after_quickstart(folder),
        *next_steps.after_eval("m", "gsm8k", adapter=None, output=None),
    ):
        program, *words = shlex.split(line)
        assert program == "mlx-adapters"
        parses(words)
        assert "it's" not in line.replace("'it'\"'\"'s a folder", ""), "quoted"
