"""A run that stops and goes on equals one that never stopped, bit for bit; what does not fit is refused."""

import contextlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small_run import config, examples, flat, tiny

from mlx_adapters.errors import TrainingError
from mlx_adapters.train.loop import Run


@pytest.mark.parametrize(("dropout", "compiled"), [(0.0, "off"), (0.3, "off"), (0.3, "on")])
def test_resume_is_bit_for_bit(tmp_path: Path, dropout: float, compiled: str) -> None:
    # 20 rows in batches of 4 are 5 steps an epoch: 12 steps cross two epochs, the stop at 7 is inside one
    settings = config(steps=12, save_every=100, compile=compiled)
    straight = tiny(dropout=dropout)
    mx.random.seed(3)
    whole = Run(straight, examples(), config=settings)
    losses = [step.loss for step in whole]

    first = tiny(dropout=dropout)
    mx.random.seed(3)
    run = Run(first, examples(), config=settings, folder=tmp_path)
    steps = iter(run)
    begun = [next(steps).loss for _ in range(7)]
    run.save()
    steps.close()

    second = tiny(dropout=dropout, seed=99)  # other adapter arrays, other random state; the same base
    frozen = {k: v for k, v in tree_flatten(first.parameters()) if "lora" not in k}
    second.load_weights(list(frozen.items()), strict=False)
    resumed = Run(second, examples(), config=settings, folder=tmp_path)
    assert resumed.resume() == 7
    assert begun + [step.loss for step in resumed] == losses
    a, b = flat(straight), flat(second)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)
    left, right = dict(tree_flatten(whole.optimizer.state)), dict(tree_flatten(resumed.optimizer.state))
    assert left.keys() == right.keys()
    assert all(np.array_equal(np.array(left[name]), np.array(right[name])) for name in left)


def test_newest_are_kept_and_nothing_half_written(tmp_path: Path) -> None:
    list(Run(tiny(), examples(), config=config(steps=7, save_every=2, keep=2), folder=tmp_path))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000006", "step-000007"]


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    list(Run(tiny(), examples(), config=config(steps=6, save_every=3), folder=tmp_path))
    file = tmp_path / "checkpoints" / "step-000006" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    warnings: list[str] = []
    run = Run(tiny(), examples(), config=config(steps=6, save_every=3), folder=tmp_path)
    assert run.resume(warnings.append) == 3
    assert "step-000006" in warnings[0]


def test_other_settings_and_other_data_are_refused(tmp_path: Path) -> None:
    list(Run(tiny(), examples(), config=config(), folder=tmp_path))
    with pytest.raises(TrainingError, match="seed was 0, now 5"):
        Run(tiny(), examples(), config=config(seed=5), folder=tmp_path).resume()
    with pytest.raises(TrainingError, match="examples"):
        Run(tiny(), examples(19), config=config(), folder=tmp_path).resume()


def test_resume_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no readable checkpoint"):
        Run(tiny(), examples(), config=config(), folder=tmp_path).resume()


def test_saving_a_step_again_never_leaves_it_unsaved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C right after the step's checkpoint saves it once more; a kill there lost the only one."""
    run = Run(tiny(), examples(), config=config(steps=4, save_every=4, keep=1), folder=tmp_path)
    list(run)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with contextlib.suppress(KeyboardInterrupt):
            run.save()
    assert Run(tiny(), examples(), config=config(steps=4), folder=tmp_path).resume() == 4


def test_a_damaged_checkpoint_is_replaced_by_the_same_step(tmp_path: Path) -> None:
    run = Run(tiny(), examples(), config=config(steps=4, save_every=4), folder=tmp_path)
    list(run)
    arrays = tmp_path / "checkpoints" / "step-000004" / "state.safetensors"
    whole = arrays.read_bytes()
    arrays.write_bytes(whole[:-100])
    run.save()
    assert arrays.read_bytes() == whole
