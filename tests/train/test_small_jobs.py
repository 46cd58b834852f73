"""A few rows are enough to learn from, and a run that learns nothing says so."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tiny import make_tiny
from typer.testing import CliRunner

from mlx_adapters.cli.app import app
from mlx_adapters.train import metrics
from mlx_adapters.train.length import LEAST_STEPS

DESK = {  # the rows of docs/tutorials/fine-tune.md
    "How do I change my password?": "Open Settings, choose Account, then Password.",
    "Where is my invoice?": "Open Settings, choose Billing, then Invoices.",
    "How do I add a colleague?": "Open Settings, choose Team, then Invite.",
    "Can I pay by card?": "Yes. Open Settings, choose Billing, then Cards.",
    "How do I close my account?": "Open Settings, choose Account, then Close.",
    "How do I change my address?": "Open Settings, choose Account, then Address.",
    "Who may see my files?": "Open Settings, choose Team, then Rights.",
    "How do I get a receipt?": "Open Settings, choose Billing, then Receipts.",
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama as wide as a small real one: what a step of LoRA changes grows with the width."""
    fields = {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8}
    folder = make_tiny("llama", tmp_path_factory.mktemp("wide"), **fields)
    file = folder / "model.safetensors"
    arrays: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    calmer = {name: array * (0.3 if array.ndim == 2 else 1) for name, array in arrays.items()}
    mx.save_safetensors(str(file), calmer, metadata={"format": "pt"})
    return folder


def rows(folder: Path, pairs: dict[str, str]) -> Path:
    file = folder / "rows.jsonl"
    made = [{"instruction": question, "output": answer} for question, answer in pairs.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


def counted(count: int) -> dict[str, str]:
    return {f"tom has {n} apples . how many ?": f"the answer is {n}" for n in range(count)}


def train(model: Path, data: Path, *options: str) -> Any:
    output = data.parent / "out"
    return CliRunner().invoke(
        app,
        ["train", str(model), "--data", str(data), "--output", str(output), "--template", "plain", *options],
    )


def losses(data: Path) -> list[float]:
    return [row["loss"] for row in metrics.read(data.parent / "out" / "metrics.jsonl")]


def test_eight_rows_are_learned_with_the_defaults(wide: Path, tmp_path: Path) -> None:
    data = rows(tmp_path, counted(8))
    done = train(wide, data)
    assert done.exit_code == 0, done.output
    assert f"few rows: {LEAST_STEPS} epochs instead of 3 make {LEAST_STEPS} steps" in done.stderr
    assert len(losses(data)) == LEAST_STEPS
    assert losses(data)[-1] < losses(data)[0] / 2


@pytest.mark.slow
def test_eight_rows_are_learned_by_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    data = rows(tmp_path, DESK)
    done = CliRunner().invoke(
        app, ["train", str(smollm2), "--data", str(data), "--output", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    assert losses(data)[-1] < losses(data)[0] / 2


def test_one_step_moves_the_adapter(folders: dict[str, Path], tmp_path: Path) -> None:
    """Six rows, one epoch: with a warm-up that begins at the rate 0 the adapter stayed the base."""
    data = rows(tmp_path, counted(6))
    done = train(folders["llama"], data, "--epochs", "1")
    assert done.exit_code == 0, done.output
    assert "few rows" not in done.stderr
    arrays = mx.load(str(tmp_path / "out" / "adapter_model.safetensors"))
    moved = [name for name, array in arrays.items() if "lora_B" in name and mx.abs(array).max() > 0]  # type: ignore[union-attr]
    assert moved


def test_a_warm_up_as_long_as_the_run_is_told(folders: dict[str, Path], tmp_path: Path) -> None:
    done = train(folders["llama"], rows(tmp_path, counted(6)), "--steps", "2", "--warmup", "9")
    assert done.exit_code == 0, done.output
    assert "all 2 steps are warm-up, so the rate stays below 0.0003" in done.stderr


def test_a_run_that_moved_nothing_fails_and_keeps_what_there_is(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    done = train(folders["llama"], rows(tmp_path, counted(6)), "--steps", "2", "--lr", "0")
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "2 steps have not changed the adapter" in line
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_an_adapter_of_no_numbers_is_not_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    """The last step is judged by the loss before it: nothing looked at what it left."""
    done = train(folders["llama"], rows(tmp_path, counted(6)), "--steps", "1", "--lr", "1e39")
    assert done.exit_code == 2
    assert "holds values that are not numbers. Lower --lr" in done.stderr
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
