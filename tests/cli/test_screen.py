"""What is printed is what was given: brackets are text, never Rich's markup."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_adapters import screen
from mlx_adapters.cli.app import app
from mlx_adapters.doctor import Finding
from mlx_adapters.errors import counted

ODD = 'pip install "mlx-adapters[cpu]" [/] :smile: [bold]x'


def test_cells_and_heads_of_a_table_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    screen.table(["head [red]", "b"], [[ODD, "[default: lora]"], ["two\nlines", ""]])
    said = capsys.readouterr().out
    for text in (ODD, "[default: lora]", "head [red]", "lines"):
        assert text in said


def test_progress_on_a_terminal_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in screen.track("my[/]set.json", [1], 1, lambda item: ODD):
        pass
    assert "my[/]set.json" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ODD in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_help_keeps_what_stands_in_brackets() -> None:
    said = CliRunner().invoke(app, ["train", "--help"]).stdout
    assert "[default: lora]" in said
    assert "[default: 0.0003]" in said


def test_one_of_a_thing_is_not_many(folders: dict[str, Path], tmp_path: Path) -> None:
    """ "trained 1 steps", "1 findings"."""
    assert [counted(n, "step") for n in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1,000 steps"]
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"prompt": "tom", "completion": "7"}) + "\n")
    said = ""
    for command in (
        ["train", folders["llama"], "--data", data, "--output", tmp_path / "out", "--steps", 1, "--layers", 0,
         "--targets", "q_proj", "--set", "rank=1", "--template", "plain"],
        ["combine", tmp_path / "out", tmp_path / "combined"],
        ["export", tmp_path / "out", tmp_path / "peft", "--base", "owner/name"],
        ["eval", folders["llama"], "--task", "wordproblems", "--limit", 1, "--max-tokens", 1],
    ):  # fmt: skip
        done = CliRunner().invoke(app, [str(word) for word in command])
        assert done.exit_code == 0, (done.output, done.exception)
        said += done.output
    for words in (
        "1 row of the form",
        "on 1 layer ",
        "1 row to train on",
        "trained 1 step ",
        "of 1 adapter, 1 layer,",
    ):
        assert words in said
    assert re.findall(r"(?<![\d.,])1 \w+s\b(?! of)", said) == []


def test_doctor_counts_its_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, words in ((1, "1 problem needs attention"), (2, "2 problems need attention")):
        found = [Finding("memory", "none", False, "buy some")] * count + [Finding("device", "CPU")]
        monkeypatch.setattr("mlx_adapters.doctor.doctor", lambda found=found: found)
        done = CliRunner().invoke(app, ["doctor"])
        assert done.exit_code == 1
        assert done.stdout.splitlines()[-1] == words
