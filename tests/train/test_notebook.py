"""What a notebook shows: the run as it goes on, and results as tables and pictures."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny

import mlx_adapters as ma
from mlx_adapters.notebook import in_notebook, table


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str]]]:
    """What a notebook would show, in its order: (new or changed, by type)."""
    seen: list[tuple[str, dict[str, str]]] = []

    class ZMQInteractiveShell:  # this name is what tells a notebook from a terminal
        pass

    def shows(kind: str) -> Any:
        return lambda content, *, raw, display_id: seen.append((kind, content))

    kernel, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    kernel.version_info = (9, 0)  # type: ignore[attr-defined]  # matplotlib asks
    kernel.get_ipython = ZMQInteractiveShell  # type: ignore[attr-defined]
    display.display, display.update_display = shows("new"), shows("changed")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return seen


def test_training_in_a_notebook_is_a_bar_and_a_curve(screen: list[Any], tmp_path: Path) -> None:
    assert in_notebook()
    model = ma.load(make_tiny("llama", tmp_path))
    rows = [{"prompt": f"tom has {n}", "completion": f"the answer is {n}"} for n in range(4)]
    result = ma.train(model, rows, ma.LoRA(rank=2), output=tmp_path / "a", steps=3, batch_size=2, lr=0.01)
    assert screen[0][0] == "new"
    assert {kind for kind, _ in screen[1:]} == {"changed"}, "one picture that changes"
    last = screen[-1][1]
    assert 'value="3" max="3"' in last["text/html"]
    assert "<polyline" in last["text/html"]
    assert last["text/plain"].startswith("3/3  epoch 1.5  loss ")
    shown = result._repr_html_()
    assert f"{result.loss:.4f}" in shown
    assert "data:image/png;base64," in shown
    assert result.plot()._repr_png_().startswith(b"\x89PNG")


def test_an_evaluation_is_a_table(tmp_path: Path) -> None:
    model = ma.load(make_tiny("llama", tmp_path))
    sets = tmp_path / "test.jsonl"
    sets.write_text("".join(json.dumps({"question": f"{n} + 1 ?", "answer": n + 1}) + "\n" for n in range(3)))
    found = ma.evaluate(model, sets, max_tokens=2)
    assert "<th>accuracy</th>" in found._repr_html_()
    assert [row["index"] for row in found.rows()] == [0, 1, 2]
    frame = found.to_pandas()
    assert list(frame["correct"]) == [row["correct"] for row in found.rows()]


def test_nothing_is_shown_where_nobody_looks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert not in_notebook()
    model = ma.load(make_tiny("llama", tmp_path))
    rows = [{"prompt": f"tom has {n}", "completion": f"the answer is {n}"} for n in range(4)]
    ma.train(model, rows, ma.LoRA(rank=2), output=tmp_path / "quiet", steps=1)
    assert "train 1/1" not in capsys.readouterr().err
    ma.train(model, rows, ma.LoRA(rank=2), output=tmp_path / "told", steps=1, progress=True)
    assert "train 1/1" in capsys.readouterr().err


def test_cells_are_text() -> None:
    cells = "<tr><th>a&lt;b</th></tr><tr><td>&lt;script&gt;</td></tr>"
    assert table(["a<b"], [["<script>"]]) == f"<table>{cells}</table>"
