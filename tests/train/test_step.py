"""One step can be read, and followed: one file, few calls, and CONTRIBUTING.md tells which."""

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.optimizers as optim
import pytest

from mlx_adapters.models import load as model
from mlx_adapters.train import step
from mlx_adapters.train.trainer import train

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"tom has {n} apples", "completion": f"the answer is {n}"} for n in range(8)]


def callers(frame: FrameType | None) -> list[str]:
    """The functions that `train` calls, down to the frame."""
    names: list[str] = []
    while frame is not None and frame.f_code.co_name != "train":
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names[::-1]


def test_a_step_is_one_short_file() -> None:
    assert len(Path(step.__file__).read_text().splitlines()) <= 150


def test_the_calls_of_a_step_are_those_that_contributing_lists(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## One training step")[2].partition("## ")[0]
    listed = [name.rpartition(".")[2] for name in re.findall(r"^\| \d+ \| `([\w.]+)`", section, re.MULTILINE)]
    paths: dict[str, list[str]] = {}
    loss_sum, apply = step.loss_sum, optim.Optimizer.apply_gradients

    def watched_loss(*args: Any, **named: Any) -> Any:
        paths["loss"] = [*callers(sys._getframe(1)), "loss_sum"]
        return loss_sum(*args, **named)

    def watched_apply(*args: Any) -> Any:
        paths["update"] = [*callers(sys._getframe(1)), "apply_gradients"]
        return apply(*args)

    monkeypatch.setattr(step, "loss_sum", watched_loss)
    monkeypatch.setattr(optim.Optimizer, "apply_gradients", watched_apply)
    options = {"steps": 1, "batch_size": 2, "template": "plain", "compile": "off"}
    train(model.load(folders["llama"]), ROWS, output=tmp_path / "out", **options)
    assert len(listed) == 12
    assert paths["loss"] == listed[:9]
    assert paths["update"] == listed[:4] + listed[10:]
