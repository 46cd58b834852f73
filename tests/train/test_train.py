"""The training loop: what is learned, how batches are weighted, what a bad step leaves behind, the record."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small_run import config, examples, flat, tiny

from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import ConfigError, TrainingError
from mlx_adapters.train import metrics
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.length import LEAST_STEPS, epochs, total_steps, warmup_steps
from mlx_adapters.train.loop import Run
from mlx_adapters.train.optimizers import learning_rate
from mlx_adapters.train.validation import validate


def test_loss_falls_and_the_base_stays() -> None:
    model = tiny()
    before = {k: np.array(v) for k, v in tree_flatten(model.parameters()) if "lora" not in k}
    steps = list(Run(model, examples(), config=config(steps=40)))
    assert np.mean([s.loss for s in steps[-5:]]) < 0.8 * steps[0].loss
    after = {k: np.array(v) for k, v in tree_flatten(model.parameters()) if "lora" not in k}
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_accumulation_weighs_tokens_and_keeps_the_partial_window() -> None:
    # 10 rows: one batch of 10 equals windows of 4 + 4 + 2, whose batches have different numbers of targets
    rows = examples(10)
    rows[0] = Example(rows[0].ids, 1)
    whole, parts = tiny(), tiny()
    one = list(Run(whole, rows, config=config(batch_size=10, steps=None, epochs=2, warmup=0)))
    split = config(batch_size=4, accumulation=3, steps=None, epochs=2, warmup=0)
    two = list(Run(parts, rows, config=split))
    assert len(one) == len(two) == 2
    assert [s.tokens for s in one] == [s.tokens for s in two] == [sum(len(r.ids) for r in rows)] * 2
    for a, b in zip(one, two):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)


def test_last_partial_window_of_an_epoch_is_a_step() -> None:
    fields = config(steps=None, epochs=2, batch_size=4, accumulation=2)
    steps = list(Run(tiny(), examples(10), config=fields))
    assert len(steps) == total_steps(examples(10), fields) == 4
    assert sum(s.tokens for s in steps[:2]) == sum(len(e.ids) for e in examples(10))
    assert steps[-1].epoch == 2


def test_first_gradient_norm_is_that_of_the_plain_mean_loss() -> None:
    rows, model = examples(4), tiny()

    def mean(model: nn.Module) -> mx.array:
        total, count = mx.array(0.0), 0
        for row in rows:
            logits = model(mx.array([row.ids[:-1]]))[0]
            wanted = mx.array(row.ids[1:])
            losses = nn.losses.cross_entropy(logits, wanted)[row.loss_start - 1 :]
            total, count = total + losses.sum(), count + len(row.ids) - row.loss_start
        return total / count

    loss, grads = nn.value_and_grad(model, mean)(model)
    norm = math.sqrt(sum(float(g.square().sum()) for _, g in tree_flatten(grads)))
    first = next(iter(Run(model, rows, config=config())))
    assert first.loss == pytest.approx(float(loss), rel=1e-5)
    assert first.grad_norm == pytest.approx(norm, rel=1e-4)


def test_validation_is_weighted_by_tokens() -> None:
    model, rows = tiny(), examples(7)
    together = validate(model, rows, batch_size=7, pad_id=0)
    assert validate(model, rows, batch_size=2, pad_id=0) == pytest.approx(together, rel=1e-5)


def test_validation_does_not_disturb_the_run() -> None:
    plain, watched = tiny(dropout=0.3), tiny(dropout=0.3)
    mx.random.seed(1)
    list(Run(plain, examples(), config=config()))
    mx.random.seed(1)
    steps = list(Run(watched, examples(), examples(3, seed=9), config=config(validate_every=2)))
    assert [s.step for s in steps if s.validation_loss is not None] == [2, 4, 6]
    a, b = flat(plain), flat(watched)
    assert all(np.array_equal(a[k], b[k]) for k in a)


def test_not_a_number_stops_before_the_update(tmp_path: Path) -> None:
    model = tiny()
    run = Run(model, examples(), config=config(save_every=2), folder=tmp_path)
    steps = iter(run)
    for _ in range(3):
        next(steps)
    good = flat(model)
    model.model.norm.weight = model.model.norm.weight * math.nan
    with pytest.raises(TrainingError, match="step 4"):
        next(steps)
    now = flat(model)
    assert all(np.array_equal(good[k], now[k]) for k in good)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 4, 14])
def test_rates_are_those_of_transformers_without_its_first_step(schedule: str, warmup: int) -> None:
    """Which has the rate 0: with it a run of one step would train nothing."""
    import torch
    from transformers import get_scheduler

    total, lr = 14, 1e-3
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup + 1, num_training_steps=total + 1)
    expected = []
    for _ in range(total):
        optimizer.step()
        theirs.step()
        expected.append(theirs.get_last_lr()[0])
    settings = config(steps=total, warmup=warmup, lr=lr, schedule=schedule)
    rates = [learning_rate(settings, total)(mx.array(step)).item() for step in range(total)]
    assert rates == pytest.approx(expected, rel=1e-5)
    assert min(rates) > 0


def test_a_run_takes_those_rates() -> None:
    steps = list(Run(tiny(), examples(), config=config(steps=14, warmup=4, lr=1.0e-3)))
    assert [step.lr for step in steps[:6]] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 9e-4], rel=1e-4)


def test_a_warm_up_that_nobody_chose_is_at_most_a_tenth_of_the_run() -> None:
    lengths = (1, 3, 9, 10, 40, 100, 5000)
    assert [warmup_steps(TrainConfig(), total) for total in lengths] == [0, 0, 0, 1, 4, 10, 10]
    assert warmup_steps(TrainConfig(warmup=100), 40) == 40


def test_few_rows_make_enough_steps_unless_the_length_was_chosen() -> None:
    def run(count: int, **chosen: Any) -> tuple[int, int]:
        fields, rows = TrainConfig(**chosen), examples(count)
        return epochs(rows, fields), total_steps(rows, fields)

    assert run(8) == (LEAST_STEPS, LEAST_STEPS)
    assert run(20) == (math.ceil(LEAST_STEPS / 3), 3 * math.ceil(LEAST_STEPS / 3))
    many = 8 * LEAST_STEPS
    assert run(many) == (3, 3 * LEAST_STEPS)
    assert run(8, epochs=2) == (2, 2)
    assert run(8, steps=5)[1] == 5
    assert run(8, packing=True)[1] >= LEAST_STEPS


def test_every_wrong_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=0.*lr=nan.*schedule 'linaer'.*'linear'"):
        TrainConfig(batch_size=0, lr=math.nan, schedule="linaer")


def test_record_and_plot(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    steps = list(Run(tiny(), examples(), examples(3, seed=9), config=config(validate_every=3)))
    for step in steps:
        metrics.append(file, [step.record()])
    metrics.append(
        file, [replace(steps[-1], loss=0.5).record()]
    )  # a resumed run repeats a step: the later one counts
    with file.open("a") as stream:
        stream.write('{"step": 7, "lo')  # a killed run
    rows = metrics.read(file)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] == 0.5
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6]
    metrics.plot(rows, tmp_path / "loss.png", title="run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
