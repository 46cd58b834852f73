"""What is printed is what was given: brackets are text, never Rich's markup."""

import io
import sys

import pytest
from typer.testing import CliRunner

from mlx_adapters.cli import screen
from mlx_adapters.cli.app import app

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
