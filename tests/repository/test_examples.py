"""The examples run as their first lines say, the notebook cell by cell."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tiny import make_tiny

from mlx_adapters.models import embedded

EXAMPLES = Path(__file__).parents[2] / "examples"
SVG = "{http://www.w3.org/2000/svg}"
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
    assert "2 steps in" in said
    assert said.count("of 4 correct") == 2
    assert "0 of the items were in the training data" in said
    assert "passed" in said


@pytest.mark.slow
def test_the_notebook_runs_as_it_is(run: Run) -> None:
    """With the quickstart's file of the model, in place of the hub's."""
    source = repr(str(embedded.embedded_model()))
    program = notebook()
    assert program.count(f'SOURCE = BASE = "{embedded.HUB_ID}"') == 1
    said = run(program.replace("SOURCE = BASE =", f"SOURCE = {source}\nBASE ="))
    counts = [int(line.split()[0]) for line in said.splitlines() if "of 100 correct" in line]
    assert len(counts) == 2
    assert counts[1] > counts[0] + 20
    assert "passed" in said


def on_screen(picture: Path, at: float) -> list[str]:
    """The lines that a recording shows at a share of its length, by its own keyframes."""
    text = picture.read_text(encoding="utf-8")
    frames = re.findall(
        r"@keyframes (w\d+)\{0%\{visibility:hidden\}([\d.]+)%\{visibility:visible\}([\d.]+)?", text
    )
    windows = {name: (float(start), float(end) if end else 101.0) for name, start, end in frames}
    lines: dict[float, str] = {}
    for group in ElementTree.fromstring(text).iter(f"{SVG}g"):
        if group.get("class") is None:
            continue
        start, end = windows[str(group.get("class"))]
        assert (group.get("visibility") == "hidden") == (end < 100)
        if start <= 100 * at < end:
            for part in group.findall(f"{SVG}text"):
                row, column = float(part.get("y", 0)), round(float(part.get("x", 0)) / 8.4)
                lines[row] = lines.get(row, "").ljust(column) + (part.text or "")
    return [lines[row] for row in sorted(lines)]


def test_a_recording_shows_what_the_terminal_showed(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # a path that fits into the line of the prompt
    request.addfinalizer(lambda: shutil.rmtree(folder))
    program = folder / "a.py"
    program.write_text(
        "import sys, time\nfrom rich.progress import track\n"
        "print('a <b>  & c'); time.sleep(0.5)\n"
        "for i in track(range(3), 'work'): time.sleep(0.2)\n"
        "print('done', file=sys.stderr)\n"
    )
    picture = tmp_path / "out.svg"
    command = [sys.executable, str(EXAMPLES / "recording.py"), str(picture), "--seconds", "6"]
    command += ["--command", f"python {program}"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    prompt, text = f"$ python {program}", "a <b>  & c"
    assert on_screen(picture, 0.0) == [prompt]
    assert on_screen(picture, 0.99)[:2] + on_screen(picture, 0.99)[3:] == [prompt, text, "done"]
    on_the_way = [on_screen(picture, share / 100) for share in range(70)]
    assert [prompt, text] in on_the_way
    bars = [lines[2] for lines in on_the_way if len(lines) > 2]
    assert any("33%" in bar for bar in bars)
    assert not any("100%" in bar for bar in bars[:3])
    assert "100%" in on_screen(picture, 0.99)[2]


def test_the_recording_in_the_readme_is_of_the_quickstart() -> None:
    lines = on_screen(EXAMPLES.parent / "docs" / "quickstart.svg", 0.99)
    assert lines[0] == "$ mlx-adapters quickstart"
    assert any(line.startswith("1. Convert") for line in lines)
    (gain,) = (line for line in lines if line.startswith("Gain:"))
    assert float(gain.split()[1]) >= 30
    assert gain.endswith("passed.") or any("passed" in line for line in lines)
