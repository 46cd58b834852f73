"""From Python: `train` to the end, `Trainer` step by step, callbacks, every form of data, a bare model."""

import os
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from cases import METHODS
from mlx.utils import tree_flatten
from small_run import jsonl

from mlx_adapters import adapter, methods
from mlx_adapters.errors import AdapterError, ConfigError, DataError, OutputError, TrainingError
from mlx_adapters.models import load as model
from mlx_adapters.train.callbacks import Callback, StopTraining
from mlx_adapters.train.progress import Step
from mlx_adapters.train.trainer import Trainer, TrainResult, train

ROWS = [{"prompt": f"tom has {n % 10} apples", "completion": f"the answer is {n % 7}"} for n in range(12)]
OPTIONS: dict[str, Any] = {"steps": 4, "batch_size": 4, "lr": 1e-2, "template": "plain"}
IDS = mx.array([[5, 6, 7, 8, 9, 10]])


def logits(loaded: model.LanguageModel) -> np.ndarray:
    loaded.model.eval()
    return np.array(loaded.model(IDS))


def test_train_saves_and_leaves_the_model_bare(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = model.load(folders["llama"])
    before = logits(loaded)
    result = train(loaded, ROWS, output=str(tmp_path / "out"), validation=2, validate_every=2, **OPTIONS)
    assert np.array_equal(logits(loaded), before)
    assert not adapter.layers(loaded.model)
    assert not tree_flatten(loaded.model.trainable_parameters())
    assert isinstance(result, TrainResult)
    assert (result.adapter, result.method, result.stopped) == (tmp_path / "out", "lora", None)
    assert (result.step, result.steps, result.rows) == (4, 4, 10)
    assert [row["step"] for row in result.metrics] == [1, 2, 3, 4]
    assert result.loss == result.metrics[-1]["loss"]
    assert result.validation_loss == result.metrics[-1]["validation_loss"]
    assert 0 < result.trainable < result.parameters
    again = train(loaded, ROWS, output=tmp_path / "again", validation=2, validate_every=2, **OPTIONS)
    assert [row["loss"] for row in again.metrics] == [row["loss"] for row in result.metrics]
    adapter.load(loaded, result.adapter)
    assert not np.array_equal(logits(loaded), before)


def test_an_adapter_that_was_there_before_stays(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = model.load(folders["llama"])
    placed = adapter.attach(loaded, methods.make("lora", {}))
    with pytest.raises(AdapterError, match="carries an adapter already"):
        Trainer(loaded, ROWS, output=tmp_path / "out", **OPTIONS)
    assert adapter.layers(loaded.model) == placed


@pytest.mark.parametrize(
    "case", [c for c, m in METHODS.items() if "llama" not in m.refused and not m.prepare]
)
def test_detaching_gives_the_base_back(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Also what packing, recomputation and noise did to the modules' classes."""
    loaded, method = model.load(folders["llama"]), METHODS[case]
    before, kinds = logits(loaded), [type(module) for module in loaded.model.modules()]
    options: dict[str, Any] = OPTIONS | {"steps": 1, "neftune": 5.0, "gradient_checkpointing": True}
    if method.name in ("prompt", "ptuning", "prefix"):
        options["neftune"] = 0.0
    trainer = Trainer(
        loaded, ROWS, methods.make(method.name, dict(method.fields)), output=tmp_path / "out", **options
    )
    assert not np.array_equal(kinds, [type(module) for module in loaded.model.modules()])
    trainer.detach()
    assert [type(module) for module in loaded.model.modules()] == kinds
    assert np.array_equal(logits(loaded), before)


class Noted(Callback):
    def __init__(self, **answers: Any) -> None:
        self.events: list[tuple[str, Any]] = []
        self.answers = answers

    def on_step(self, step: Step) -> bool | None:
        self.events.append(("step", step.step))
        return self.answers.get("step")

    def on_validation(self, step: Step) -> bool | None:
        self.events.append(("validation", step.step))
        return self.answers.get("validation")

    def on_checkpoint(self, folder: Path) -> bool | None:
        self.events.append(("checkpoint", folder.name))
        if self.answers.get("checkpoint") == "raise":
            raise StopTraining
        return None

    def on_end(self, result: TrainResult) -> None:
        self.events.append(("end", result.steps))


def test_callbacks_hear_of_everything(folders: dict[str, Path], tmp_path: Path) -> None:
    noted, losses = Noted(), []
    options = OPTIONS | {"validation": 2, "validate_every": 4, "save_every": 2}
    callbacks = [noted, lambda step: losses.append(step.loss)]
    result = train(
        model.load(folders["llama"]), ROWS, output=tmp_path / "out", callbacks=callbacks, **options
    )
    assert losses == [row["loss"] for row in result.metrics]
    assert noted.events == [
        *(("step", 1), ("step", 2), ("checkpoint", "step-000002"), ("step", 3), ("step", 4)),
        *(("validation", 4), ("checkpoint", "step-000004"), ("end", 4)),
    ]


@pytest.mark.parametrize(
    ("answers", "last"), [({"step": False}, 1), ({"validation": False}, 3), ({"checkpoint": "raise"}, 2)]
)
def test_a_callback_ends_the_run_which_can_be_resumed(
    answers: dict[str, Any], last: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    options = OPTIONS | {"validation": 2, "validate_every": 3, "save_every": 2}
    whole = train(model.load(folders["llama"]), ROWS, output=tmp_path / "whole", **options)
    loaded, output = model.load(folders["llama"]), tmp_path / "out"
    result = train(loaded, ROWS, output=output, callbacks=[Noted(**answers)], **options)
    assert (result.steps, result.stopped) == (last, "a callback ended it")
    assert (output / "adapter_model.safetensors").exists()
    resumed = train(loaded, ROWS, output=output, resume=True, **options)
    assert [row["loss"] for row in resumed.metrics] == [row["loss"] for row in whole.metrics]
    assert resumed.stopped is None


def test_ctrl_c_saves_and_is_passed_on(folders: dict[str, Path], tmp_path: Path) -> None:
    def press(step: Step) -> None:
        if step.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    loaded = model.load(folders["llama"])
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 3: saved in .*out"):
        train(loaded, ROWS, output=tmp_path / "out", callbacks=[press], **OPTIONS)
    assert not adapter.layers(loaded.model)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train(loaded, ROWS, output=tmp_path / "out", resume=True, **OPTIONS).steps == 4


def test_every_form_of_data_is_the_same_run(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = jsonl(tmp_path / "all.jsonl", ROWS)
    parts = [jsonl(tmp_path / "a.jsonl", ROWS[:5]), str(jsonl(tmp_path / "b.jsonl", ROWS[5:]))]
    loaded, losses = model.load(folders["llama"]), []
    for number, data in enumerate((ROWS, whole, str(whole), parts)):
        result = train(loaded, data, output=tmp_path / str(number), **OPTIONS)
        losses.append([row["loss"] for row in result.metrics])
    assert losses[1:] == losses[:1] * 3
    other = jsonl(tmp_path / "c.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"c\.jsonl: rows of text.*a\.jsonl are of the form completion"):
        train(loaded, [parts[0], other], output=tmp_path / "mixed", **OPTIONS)
    with pytest.raises(DataError, match="row 1: field 'completion' is missing"):
        train(loaded, [ROWS[0], {"prompt": "a"}], output=tmp_path / "odd", **OPTIONS)


def test_a_refusal_leaves_the_model_bare_and_the_folder_free(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    loaded = model.load(folders["llama"])
    with pytest.raises(ConfigError, match=r"'epoch'.*'epochs'"):
        train(loaded, ROWS, output=tmp_path / "out", epoch=3)
    with pytest.raises(ConfigError, match=r"rates: no trained array matches"):
        train(loaded, ROWS, output=tmp_path / "out", rates="nothing=2", **OPTIONS)
    assert not adapter.layers(loaded.model)
    trainer = Trainer(loaded, ROWS, output=tmp_path / "out", **OPTIONS)
    with pytest.raises(TrainingError, match="has not ended"):
        _ = trainer.result
    steps = iter(trainer)
    next(steps)
    trainer.save()
    with pytest.raises(OutputError, match="another run is writing"):
        Trainer(model.load(folders["llama"]), ROWS, output=tmp_path / "out", resume=True, **OPTIONS)
    assert [step.step for step in steps] == [2, 3, 4]
    assert trainer.result.steps == 4
