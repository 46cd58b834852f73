"""What is measured while training: right answers, samples, the loss before; and what it leaves alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small_run import jsonl

from mlx_adapters import adapter
from mlx_adapters.errors import ConfigError, TrainingError
from mlx_adapters.evaluate.run import evaluate
from mlx_adapters.methods import LoRA
from mlx_adapters.models import load as model
from mlx_adapters.train import metrics
from mlx_adapters.train.callbacks import Started
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.progress import Measured, Progress, Sample, Step
from mlx_adapters.train.summary import summary
from mlx_adapters.train.trainer import Trainer, train

ROWS = [{"prompt": f"tom has {n} apples", "completion": f"the answer is {n}"} for n in range(1, 6)]
METHOD = LoRA(rank=8, targets="all-linear", dropout=0.1)
OPTIONS: dict[str, Any] = {"steps": 40, "batch_size": 5, "lr": 1e-2, "template": "plain", "save_every": 8}


@dataclass
class Watched:
    """A run that was watched, with the adapter as it was after step 10."""

    trainer: Trainer
    steps: list[Step]
    said: list[str]
    options: dict[str, Any]
    early: Path
    test: Path

    @property
    def output(self) -> Path:
        return self.trainer.output


@pytest.fixture(scope="module")
def watched(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Watched:
    root = tmp_path_factory.mktemp("watched")
    test = [{"question": row["prompt"], "answer": row["completion"].split()[-1]} for row in ROWS]
    files = {"eval_task": str(jsonl(root / "test.jsonl", test))}
    files["validation"] = str(jsonl(root / "other.jsonl", [*ROWS[:1], *[{**ROWS[1], "prompt": "tom has a"}]]))
    every = {"eval_every": 10, "validate_every": 15, "eval_samples": 1, "best": True}
    options = OPTIONS | files | every
    trainer = Trainer(model.load(folders["llama"]), ROWS, METHOD, output=root / "out", **options)
    said, steps = list[str](), []
    trainer.callbacks.append(Started(said.append))
    for step in trainer:
        steps.append(step)
        if step.step == 10:
            adapter.save(trainer.model.model, root / "early", meta=trainer.meta)
    trainer.detach()
    return Watched(trainer, steps, said, options, root / "early", Path(files["eval_task"]))


def test_answers_become_right_and_are_counted(watched: Watched) -> None:
    shares = {step.step: step.accuracy for step in watched.steps if step.accuracy is not None}
    assert list(shares) == [10, 20, 30, 40]
    result = watched.trainer.result
    assert (result.accuracy_before, result.accuracy) == (0.2, max(shares.values()))
    assert result.accuracy == 1.0
    assert result.step == min(step for step, share in shares.items() if share == 1.0) < 40
    assert result.remarks() == [f"the adapter is that of step {result.step}, accuracy 100.0%"]
    assert result.metrics[9]["accuracies"] == {"test": shares[10]}
    rows = metrics.read(watched.output / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(41))
    assert rows[0].keys() == {"step", "validation_loss", "accuracy", "accuracies"}
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 15, 30, 40]
    assert rows[0]["validation_loss"] == result.validation_loss_before > rows[30]["validation_loss"]
    first = f"before the first step: validation loss {rows[0]['validation_loss']:.4f}, accuracy on test 20.0%"
    assert watched.said[0] == first
    assert watched.said[1].startswith('before the first step: "tom has 1 apples" -> "')
    assert watched.steps[19].remarks() == [f"step 20: accuracy on test {shares[20]:.1%}"]


def test_it_is_what_eval_measures(watched: Watched, folders: dict[str, Path]) -> None:
    """Of the adapter saved at that step, some of whose answers are right."""
    found = evaluate(folders["llama"], watched.test, adapter=watched.early, limit=100)
    assert found.accuracy == watched.steps[9].accuracy
    assert 0 < found.accuracy < 1
    assert found.settings["template"] == "plain"


def test_it_changes_nothing_that_is_trained(
    watched: Watched, folders: dict[str, Path], tmp_path: Path
) -> None:
    plain = train(model.load(folders["llama"]), ROWS, METHOD, output=tmp_path / "out", **OPTIONS)
    assert [row["loss"] for row in plain.metrics] == [step.loss for step in watched.steps]
    assert plain.metrics[0]["step"] == 1, "without anything to measure there is no step 0"
    assert plain.validation_loss_before is None


def test_a_resumed_run_measures_the_rest(watched: Watched, folders: dict[str, Path], tmp_path: Path) -> None:
    loaded, output, said = model.load(folders["llama"]), tmp_path / "out", list[str]()
    made = Trainer(loaded, ROWS, METHOD, output=output, **watched.options)
    for step in made:
        if step.step == 19:
            break  # the newest checkpoint is that of step 16
    made.detach()
    other = watched.options | {"eval_limit": 3}
    with pytest.raises(TrainingError, match="rows that decide which step is best was"):
        Trainer(loaded, ROWS, METHOD, output=output, resume=True, **other)
    resumed = Trainer(loaded, ROWS, METHOD, output=output, resume=True, **watched.options)
    resumed.callbacks.append(Started(said.append))
    assert next(iter(resumed)).step == 17
    for _ in resumed:
        pass
    assert said == [], "what was measured before the first step is not measured again"
    assert resumed.result.step == watched.trainer.result.step
    for name in ("accuracy", "accuracy_before", "validation_loss_before", "loss"):
        assert getattr(resumed.result, name) == getattr(watched.trainer.result, name)
    for name in ("samples.jsonl", "adapter_model.safetensors"):
        assert (output / name).read_bytes() == (watched.output / name).read_bytes(), name


def test_samples_are_kept_with_what_was_expected(watched: Watched) -> None:
    rows = [json.loads(line) for line in (watched.output / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 15, 30, 40]
    assert {(row["prompt"], row["expected"]) for row in rows} == {("tom has 1 apples", "the answer is 1")}
    assert rows[-1]["answer"] == "the answer is 1"
    assert Sample(prompt="a\n b", answer="c" * 200, expected="d").in_words().endswith('c ...", expected "d"')


def test_what_is_measured_is_said(watched: Watched) -> None:
    said = summary(watched.trainer)
    assert "5 rows to train on, template plain, loss on completion" in said
    assert f"validation on 2 rows of {watched.options['validation']}, every 15 steps" in said
    assert "accuracy on 5 items of test, every 10 steps" in said
    assert [note for note in watched.trainer.notes if "validation" in note] == [
        "validation rows with the question of a training row: 1 of 2. On these the loss tells what was "
        "learned by heart"
    ]


def test_prompts_of_a_file_are_answered(folders: dict[str, Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("tom has 3 apples\n\nhow many ?\n")
    options = OPTIONS | {"steps": 2, "validate_every": 2, "eval_samples": str(prompts), "packing": True}
    loaded = model.load(folders["llama"])
    steps = []
    made = Trainer(loaded, ROWS, output=tmp_path / "out", gradient_checkpointing=True, **options)
    for step in made:
        steps.append(step)
    made.detach()
    assert [len(step.samples) for step in steps] == [0, 2]
    assert [sample.prompt for sample in steps[1].samples] == ["tom has 3 apples", "how many ?"]
    for wrong, options in (
        ("needs validation rows", {"eval_samples": 2}),
        ("loss_on=all", {"eval_samples": 2, "validation": 2, "loss_on": "all"}),
    ):
        with pytest.raises(ConfigError, match=wrong):
            Trainer(loaded, ROWS, output=tmp_path / "none", **OPTIONS, **options)


def test_the_best_is_the_most_accurate_then_the_lower_loss() -> None:
    progress = Progress()
    for step, accuracy, loss, better in (
        (10, 0.5, 2.0, True),
        (20, 0.5, 2.5, False),
        (30, 0.4, 1.0, False),
        (40, 0.5 + 1e-8, 1.9, True),
        (50, 0.6, 9.0, True),
    ):
        found = Measured(step=step, accuracy=accuracy, validation_loss=loss)
        assert progress.measured(found, "accuracy") is better, step
    assert not progress.measured(Measured(step=60, validation_loss=0.1), "accuracy"), "none were asked"
    assert (progress.best_step, progress.worse) == (50, 0)
    assert Progress(best_loss=2.0, best_step=10).measured(Measured(step=20, validation_loss=1.0), "loss")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 1.5}, "validation=1.5 must be a number of rows, or a fraction"),
        ({"validation": "1.0"}, "validation=1.0 must be"),
        ({"validation": -1}, "validation=-1 must be at least 0"),
        ({"eval_every": 5}, "eval_every needs test sets"),
        ({"best_by": "accuracy"}, "best_by=accuracy needs test sets"),
        ({"best_by": "los"}, "'los'.*'loss'"),
        ({"eval_samples": 0}, "eval_samples=0 must be at least 1"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**options)


def test_the_smooth_line_does_not_lag(tmp_path: Path) -> None:
    import numpy as np

    steps = np.arange(1.0, 401)
    places, line = metrics.smoothed(steps, 5 - 0.01 * steps)
    np.testing.assert_allclose(line, 5 - 0.01 * places, atol=1e-9)  # at both ends too
    places, line = metrics.smoothed(steps, np.abs(steps - 200))
    assert abs(places[line.argmin()] - 200) <= 2
    assert metrics.smoothed(steps[:1], steps[:1])[1] == [1.0]
    old = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.0}]
    for number, rows in enumerate(
        (old, [], [{"step": 0, "accuracy": 0.5, "accuracies": {"test": 0.5}}, *old])
    ):
        metrics.plot(rows, tmp_path / f"{number}.png", title="run")


def test_stopped_while_answers_are_counted(
    watched: Watched, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The run ends at once, and what it did not measure is measured when it goes on: the same end."""
    loaded, output = model.load(folders["llama"]), tmp_path / "out"
    trainer = Trainer(loaded, ROWS, METHOD, output=output, **watched.options)
    heard = list[str]()

    def press(doing: str) -> None:
        heard.append(doing)
        if trainer.run.step == 30 and doing.startswith("test 2/5"):
            trainer.stop()

    trainer.watch.tell = press
    last = list(trainer)[-1]
    trainer.detach()
    assert (last.step, last.stopped, last.accuracy, last.samples) == (30, "interrupted", None, ())
    assert last.validation_loss == watched.steps[29].validation_loss
    assert heard[-1].startswith("test 2/5  ")
    resumed = Trainer(loaded, ROWS, METHOD, output=output, resume=True, **watched.options)
    assert [step.step for step in resumed] == list(range(31, 41))
    resumed.detach()
    for name in ("samples.jsonl", "adapter_model.safetensors"):
        assert (output / name).read_bytes() == (watched.output / name).read_bytes(), name
    kept = ("step", "loss", "validation_loss", "accuracy")
    rows, straight = (metrics.read(folder / "metrics.jsonl") for folder in (output, watched.output))
    assert [[row.get(name) for name in kept] for row in rows] == [
        [row.get(name) for name in kept] for row in straight
    ]
    assert resumed.run.progress == watched.trainer.run.progress
