"""How a run ends or goes on: the best validation, patience, bad steps, spikes; noise; where numbers go."""

import json
import math
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small_run import config, examples, flat, tiny

from mlx_adapters.errors import ConfigError, OutputError, TrainingError, UnsupportedError
from mlx_adapters.models import load as model
from mlx_adapters.train import checkpoint, metrics
from mlx_adapters.train import step as training_step
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loggers import open_loggers
from mlx_adapters.train.loop import Run
from mlx_adapters.train.noise import add_noise
from mlx_adapters.train.trainer import Trainer

# the loss on rows of another kind rises as soon as these are learned
OTHER = examples(6, seed=77)


def overfitting(folder: Path | None = None, **fields: Any) -> Run:
    settings = config(**({"steps": 40, "lr": 5e-2, "validate_every": 4, "validation": 6} | fields))
    return Run(tiny(), examples(8), OTHER, config=settings, folder=folder)


def test_best_checkpoint_is_kept_beside_the_last(tmp_path: Path) -> None:
    run = overfitting(tmp_path, keep=1)
    steps, arrays = [], {}
    for step in run:
        steps.append(step)
        arrays[step.step] = flat(run.model)
    measured = {step.step: step.validation_loss for step in steps if step.validation_loss is not None}
    best = min(measured, key=lambda step: measured[step])
    assert best < 40
    names = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert names == [f"best-{best:06d}", "step-000040"]
    assert run.use_best() == best
    now = flat(run.model)
    assert all(np.array_equal(now[name], arrays[best][name]) for name in now)


def test_patience_ends_the_run_and_resuming_does_not_go_on(tmp_path: Path) -> None:
    run = overfitting(tmp_path, patience=2)
    steps = list(run)
    assert len(steps) < 40
    assert steps[-1].stopped == f"no better validation than step {run.progress.best_step}'s"
    assert [step.stopped for step in steps[:-1]] == [None] * (len(steps) - 1)
    assert steps[-1].step == run.progress.best_step + 2 * 4
    again = overfitting(tmp_path, patience=2)
    assert again.resume() == steps[-1].step
    assert list(again) == []
    assert again.use_best() == run.progress.best_step


def test_progress_survives_a_resume(tmp_path: Path) -> None:
    """The same best step and the same end as without the stop."""
    straight = overfitting(tmp_path / "a", patience=2)
    end = list(straight)[-1].step
    begun = overfitting(tmp_path / "b", patience=2)
    for step in begun:
        if step.step == 5:
            break
    begun.save()
    resumed = overfitting(tmp_path / "b", patience=2)
    resumed.resume()
    assert list(resumed)[-1].step == end
    assert resumed.progress == straight.progress


@pytest.mark.parametrize("fields", [{"patience": 2}, {"best": True}])
def test_best_without_validation_is_refused(
    fields: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="give validation, or eval_task"):
        TrainConfig(validation=0, **fields)
    loaded = model.load(folders["llama"])
    with pytest.raises(ConfigError, match="give validation, or eval_task"):
        Trainer(loaded, rows_file(tmp_path), output=tmp_path / "out", **fields)


Spoil = Callable[[Run, int, float], None]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """`spoil(run, at, by)`: the loss of step `at` is multiplied by `by`."""
    real = training_step.loss_fn

    def of_run(run: Run, at: int, by: float) -> None:
        monkeypatch.setattr(
            training_step, "loss_fn", lambda *given: real(*given) * (by if run.step == at - 1 else 1.0)
        )

    return of_run


def test_a_bad_step_is_skipped_and_changes_nothing(spoil: Spoil) -> None:
    run = Run(tiny(), examples(), config=config(on_bad_step="skip", steps=8))
    spoil(run, 4, math.nan)
    before: dict[str, np.ndarray] = {}
    for step in run:
        if step.step == 4:
            assert step.skipped
            assert math.isnan(step.loss)
            after = flat(run.model)
            assert all(np.array_equal(before[name], after[name]) for name in after)
            state = dict(tree_flatten(run.optimizer.state))
            assert all(bool(mx.isfinite(array).all()) for array in state.values())
        else:
            assert not step.skipped
        before = flat(run.model)
    assert run.step == 8
    assert all(np.isfinite(array).all() for array in before.values())


def test_a_spike_is_a_bad_step_after_twenty_good_ones(spoil: Spoil) -> None:
    settings = config(steps=30, spike=3.0, on_bad_step="skip")
    run = Run(tiny(), examples(), config=settings)
    spoil(run, 25, 50.0)
    assert [step.step for step in run if step.skipped] == [25]
    stopping = Run(tiny(), examples(), config=config(steps=30, spike=3.0))
    spoil(stopping, 25, 50.0)
    with pytest.raises(TrainingError, match=r"step 25: the loss is .*on-bad-step skip"):
        list(stopping)
    unaware = Run(tiny(), examples(), config=config(steps=30))
    spoil(unaware, 25, 50.0)
    assert not any(step.skipped for step in unaware)


def test_ten_bad_steps_in_a_row_end_the_run_anyhow(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tiny(), examples(), config=config(on_bad_step="skip", steps=40))
    monkeypatch.setattr(
        training_step, "loss_sum", lambda model, *_, **__: math.inf * model.model.norm.weight.sum()
    )
    with pytest.raises(TrainingError, match=r"step 10: .*10 bad steps in a row"):
        list(run)


def test_noise_is_uniform_of_the_papers_size_and_only_in_training() -> None:
    network = tiny()
    ids = mx.array([[5, 6, 7, 8, 9]] * 4)
    network.eval()
    plain = np.array(network.model.embed_tokens(ids))
    add_noise(network, 5.0)
    np.testing.assert_array_equal(network.model.embed_tokens(ids), plain)
    network.train()
    noise = np.concatenate([np.array(network.model.embed_tokens(ids)) - plain for _ in range(50)])
    bound = 5 / math.sqrt(5 * 32)
    assert np.abs(noise).max() <= bound * (1 + 1e-5)
    assert noise.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert abs(noise.mean()) < 0.01


def test_a_run_with_noise_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = config(steps=8, neftune=5.0, save_every=100)
    whole = Run(tiny(), examples(), config=settings)
    losses = [step.loss for step in whole]
    quiet = [step.loss for step in Run(tiny(), examples(), config=config(steps=8))]
    assert losses != quiet
    begun = Run(tiny(), examples(), config=settings, folder=tmp_path)
    for step in begun:
        if step.step == 3:
            break
    begun.save()
    resumed = Run(tiny(), examples(), config=settings, folder=tmp_path)
    resumed.resume()
    assert [step.loss for step in resumed] == losses[3:]


def rows_file(folder: Path, count: int = 20) -> Path:
    file = folder / "data.jsonl"
    rows = [
        {"prompt": f"tom has {n % 10} apples", "completion": f"the answer is {n % 7}"} for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def trainer(folders: dict[str, Path], tmp_path: Path, **options: Any) -> Any:
    settings = {"steps": 6, "batch_size": 4, "validation": 4, "validate_every": 2, "lr": 5e-2, "best": True}
    loaded = model.load(folders["llama"])
    return Trainer(loaded, rows_file(tmp_path), output=tmp_path / "out", **settings, **options)


def test_a_trainer_ends_with_the_best(folders: dict[str, Path], tmp_path: Path) -> None:
    made = trainer(folders, tmp_path)
    losses = {step.step: step.validation_loss for step in made if step.validation_loss is not None}
    best = min(losses, key=lambda step: losses[step])
    assert made.result.step == best
    config = json.loads((tmp_path / "out" / "mlx_adapters.json").read_text())
    assert config["training"]["steps_done"] == best


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_beside_a_checkpoint_loses_no_line_of_the_record(
    moment: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint whose step was not yet on record left a gap that no resume filled."""
    save = checkpoint.save

    def killed(*arguments: Any, step: int, best: bool, **named: Any) -> Path:
        last = step == 6 and not best
        if last and moment == "before":
            raise KeyboardInterrupt
        written = save(*arguments, step=step, best=best, **named)
        if last:
            raise KeyboardInterrupt
        return written

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        list(trainer(folders, tmp_path))
    monkeypatch.setattr(checkpoint, "save", save)
    resumed = trainer(folders, tmp_path, resume=True)
    list(resumed)
    assert [row["step"] for row in metrics.read(tmp_path / "out" / "metrics.jsonl")] == list(range(7))


def test_numbers_go_to_tensorboard(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="pip install tensorboardX")
    made = trainer(folders, tmp_path, log=["tensorboard"])
    losses = [step.loss for step in made]
    assert len(losses) == 6
    (events,) = (tmp_path / "out" / "tensorboard").iterdir()
    content = events.read_bytes()
    for name in (b"loss", b"validation_loss", b"tokens_per_second", b"settings"):
        assert name in content
    assert (tmp_path / "out" / "metrics.jsonl").read_text().count("\n") == 7


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_every_step(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both packages have these three functions; neither is installed for the tests."""
    logged: list[tuple[int, dict[str, float]]] = []
    told: dict[str, Any] = {}
    handle = SimpleNamespace(
        log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: told.update(closed=True)
    )

    def init(**arguments: Any) -> Any:
        told.update(arguments)
        return handle

    spec = ModuleSpec(name, None)  # other packages look whether it is installed
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init, __spec__=spec))
    made = trainer(folders, tmp_path, log=[name])
    steps = list(made)
    before, *later = logged
    assert before == (0, {"validation_loss": made.result.validation_loss_before})
    assert [(step, numbers["loss"]) for step, numbers in later] == [(s.step, s.loss) for s in steps]
    assert told["closed"]
    assert (told["project"], told["name"]) == ("mlx-adapters", "out")
    assert told["config"]["batch_size"] == 4
    options = {"project": "desk", "run_name": "first", "tags": "lora, tiny"}
    open_loggers([name], tmp_path, options)
    assert (told["project"], told["name"], told["config"]) == ("desk", "first", options)
    assert told.get("tags") == (["lora", "tiny"] if name == "wandb" else None), "trackio has none"


def test_an_unknown_logger_and_a_missing_package_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"logger 'wandbb'.*wandb"):
        open_loggers(["wandbb"], tmp_path, {})
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UnsupportedError, match=r"pip install .mlx-adapters\[trackio\]"):
        open_loggers(["trackio"], tmp_path, {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file on a full disk: Linux")
def test_a_full_disk_is_told_with_the_file_of_the_losses(folders: dict[str, Path], tmp_path: Path) -> None:
    made = trainer(folders, tmp_path)
    (tmp_path / "out" / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        list(made)
