"""The max length that a run chooses: its rows whole, as far as model and memory go."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peaks import run_peak
from peaks_vary import once_of_three
from tiny import make_tiny

import mlx_adapters as ma
from mlx_adapters import adapter
from mlx_adapters.methods import LoRA
from mlx_adapters.models import load as model
from mlx_adapters.train import max_length
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.max_length import estimate, within_memory

ROWS = [{"prompt": "tom has 3", "completion": "4 " * count} for count in (3, 9, 40)]
GIGABYTE = 1 << 30


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model made for 256 tokens."""
    return ma.load(make_tiny("llama", tmp_path_factory.mktemp("length")))


def end(trainer: ma.Trainer) -> None:
    """Leave a run that was resumed and not gone on with."""
    trainer._lock.close()
    trainer.detach()


def chosen(loaded: Any, folder: Path, rows: list[dict[str, str]] = ROWS, **options: Any) -> tuple[int, str]:
    trainer = ma.Trainer(loaded, rows, output=folder, steps=2, **options)
    trainer.detach()
    return trainer.config.max_length or 0, "".join(n for n in trainer.notes if n.startswith("max length"))


def test_it_is_the_longest_row_and_the_adapter_remembers(loaded: Any, tmp_path: Path) -> None:
    assert chosen(loaded, tmp_path / "a") == (44, "max length 44: the longest of 3 rows")
    assert chosen(loaded, tmp_path / "b", max_length=20) == (20, ""), "the user's own needs no reason"
    assert chosen(loaded, tmp_path / "c", cutoff=20) == (20, ""), "its name in earlier versions"
    ma.train(loaded, ROWS, output=tmp_path / "d", steps=1)
    assert json.loads((tmp_path / "d" / "mlx_adapters.json").read_text())["training"]["max_length"] == 44


def test_the_model_bounds_it_and_packed_rows_are_longer(loaded: Any, tmp_path: Path) -> None:
    long = [*ROWS, {"prompt": "tom", "completion": "4 " * 300}]
    tokens, reason = chosen(loaded, tmp_path / "a", long)
    assert tokens == 256
    assert reason.startswith(
        "max length 256: the longest that the model was made for; 1 of 4 rows are longer"
    )
    tokens, reason = chosen(loaded, tmp_path / "b", packing=True)
    assert (tokens, reason) == (256, "max length 256: the longest that the model was made for")
    wide = replace(loaded, config=loaded.config | {"max_position_embeddings": 4096})
    tokens, reason = chosen(wide, tmp_path / "c", packing=True)
    assert (tokens, reason) == (max_length.PACKED, "max length 512: packed; the longest of 3 rows has 44")


def test_memory_bounds_it_by_arithmetic_that_is_the_same_every_time(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(batch_size=4)
    needed = [estimate(loaded, config, tokens) for tokens in (256, 1024, 4096)]
    assert needed == sorted(needed)
    assert within_memory(loaded, config, 5000, memory=1000 * GIGABYTE) == 5000
    memory = int(estimate(loaded, config, 2048) / 0.75) + 16
    assert within_memory(loaded, config, 5000, memory=memory) == 2048
    less = (estimate(loaded, config, 2048) + estimate(loaded, config, 1920)) / 2 / 0.75
    assert within_memory(loaded, config, 5000, memory=int(less)) == 1920
    again = replace(config, gradient_checkpointing=True)
    assert within_memory(loaded, again, 5000, memory=memory) >= 2048

    wide = replace(loaded, config=loaded.config | {"max_position_embeddings": 4096})
    long = [*ROWS, {"prompt": "tom", "completion": "4 " * 900}]
    monkeypatch.setattr(max_length.device, "total_memory", lambda: memory // 2)
    tokens, reason = chosen(wide, tmp_path / "a", long)
    assert tokens == 256, "never less than it was"
    assert "memory" in reason
    assert "1 of 4 rows are longer: --long-rows" in reason
    assert "--gradient-checkpointing" in reason


def test_a_resumed_run_keeps_it_whatever_the_machine(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"output": tmp_path, "save_every": 1, "packing": True, "batch_size": 1}
    trainer = ma.Trainer(loaded, ROWS, steps=4, **options)
    assert trainer.config.max_length == 256
    next(iter(trainer))
    trainer.detach()
    monkeypatch.setattr(max_length, "_chosen", lambda *arguments: (64, "another machine"))
    trainer = ma.Trainer(loaded, ROWS, steps=4, resume=True, **options)
    assert trainer.config.max_length == 256
    assert "max length 256: that of the run that is resumed" in trainer.notes
    end(trainer)
    (state,) = sorted(tmp_path.glob("checkpoints/*/state.json"))
    facts = json.loads(state.read_text())
    facts["settings"]["cutoff"] = facts["settings"].pop("max_length")
    state.write_text(json.dumps(facts))  # as earlier versions wrote it
    trainer = ma.Trainer(loaded, ROWS, steps=4, resume=True, **options)
    assert (trainer.config.max_length, trainer.run.step) == (256, 1)
    end(trainer)
    with pytest.raises(ma.TrainingError, match="max_length was 256, now 128"):
        ma.Trainer(loaded, ROWS, steps=4, resume=True, max_length=128, **options)
    del facts["settings"]["cutoff"]  # as they wrote it without packing: 256 then, which was the default
    state.write_text(json.dumps(facts))
    assert max_length._earlier_length(tmp_path) == 256


@pytest.mark.parametrize(("again", "tokens"), [(False, 256), (True, 256), (False, 512)])
@once_of_three
def test_the_estimate_is_what_a_step_takes(again: bool, tokens: int, tmp_path: Path) -> None:
    """Within a third: `plan` measures, this only has to keep a run from a length that cannot fit."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_hidden_layers": 4}
    folder = make_tiny("llama", tmp_path, **shape, num_key_value_heads=8)
    config = TrainConfig(batch_size=1, max_length=tokens, gradient_checkpointing=again, loss_on="all")
    measured = run_peak(folder, LoRA(), replace(config, steps=1, warmup=0))
    attached = model.load(folder)
    adapter.attach(attached, LoRA())
    found = estimate(attached, config, tokens) - max_length._PROCESS
    assert 0.67 * measured < found < 1.5 * measured
