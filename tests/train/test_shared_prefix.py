"""What the rows of a step begin with is computed once, and loss and gradients stay what they were."""

from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapted import attached
from cases import ARCHITECTURES, METHODS, sampled
from gradients import Found, of_batches, same
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import RotatingKVCache
from small_run import CASES, config, flat, tiny

from mlx_adapters.data.batches import Batch, make_batch
from mlx_adapters.data.tokens import Example
from mlx_adapters.train import loop, shared_prefix
from mlx_adapters.train.loop import Run
from mlx_adapters.train.shared_prefix import (
    can_share,
    drop_prefix,
    prefix_batch,
    shared_length,
    untrained,
)

SUMS = 1e-6  # the loss is computed in float32 whatever the model is in, and its sums have another order here


def examples(start: int, *, rows: int = 9, shared: int = 18) -> list[Example]:
    rng = np.random.default_rng(7)
    front = rng.integers(4, 40, shared).tolist()
    return [Example(front + rng.integers(4, 40, int(n)).tolist(), start) for n in rng.integers(3, 15, rows)]


def window(items: list[Example]) -> list[Batch]:
    """A step of two batches of other lengths, the second one smaller."""
    return [make_batch([[item] for item in group], pad_id=0) for group in (items[:5], items[5:])]


def both(model: nn.Module, items: list[Example], **fields: Any) -> list[Found]:
    """(loss, gradients) of a step: every row on its own, then with sharing."""
    assert can_share(model)
    assert shared_length(window(items), virtual=0) == 17
    run = Run(model, items, config=config(**fields))
    return [of_batches(run, window(items), together=True, share=share) for share in (False, True)]


# the loss is on all, from within what is shared, and behind it
@pytest.mark.parametrize(("case", "start"), sampled([*product(CASES, (1, 10, 20))], every=3))
def test_the_same_for_every_method(case: str, start: int, folders: dict[str, Path]) -> None:
    loaded, _ = attached(folders["llama"], METHODS[case], trained=True)
    same(*both(loaded.model, examples(start)), within=SUMS)


@pytest.mark.parametrize("case", ["lora", "prefix", "prompt", "series", "loreft"])
def test_the_same_with_recomputed_blocks(case: str, folders: dict[str, Path]) -> None:
    loaded, _ = attached(folders["llama"], METHODS[case], trained=True)
    same(*both(loaded.model, examples(10), gradient_checkpointing=True), within=SUMS)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_same_for_every_architecture(arch: str, folders: dict[str, Path]) -> None:
    loaded, _ = attached(folders[arch], METHODS["lora"], trained=True)
    same(*both(loaded.model, examples(10)), within=SUMS)


def test_a_model_that_keeps_a_window_does_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    assert can_share(model)
    windows = [RotatingKVCache(max_size=4) for _ in model.layers]
    monkeypatch.setattr(type(model), "make_cache", lambda self: windows, raising=False)
    assert not can_share(model)


def test_blocks_below_the_first_trained_one_need_no_gradient(folders: dict[str, Path]) -> None:
    loaded, _ = attached(folders["llama"], METHODS["lora-last-layer"], trained=True)
    assert untrained(loaded.model) == len(loaded.model.layers) - 1
    loaded, _ = attached(folders["llama"], METHODS["prompt"], trained=True)
    assert untrained(loaded.model) == 0


def test_shared_tokens_are_read_twice_a_step_whatever_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    read: list[int] = []
    real = type(model.model).__call__

    def counting(self: Any, ids: mx.array, *args: Any, **named: Any) -> mx.array:
        read.append(ids.size)
        hidden: mx.array = real(self, ids, *args, **named)
        return hidden

    items = [Example([5] * 32 + [6 + row, 7 + row], 33) for row in range(8)]
    run = Run(model, items, config=config(batch_size=8, steps=1))
    monkeypatch.setattr(type(model.model), "__call__", counting)
    list(run)
    assert read[-3:] == [31, 8 * 9, 31], read  # 9: the length of a row is padded to a multiple of 8


def test_a_whole_run_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"lr": 1e-3, "batch_size": 4, "accumulation": 2, "steps": 6}
    items = examples(1, rows=24, shared=24)
    model = tiny()
    losses = [step.loss for step in Run(model, items, config=config(**fields))]
    compiled = tiny()
    of_compiled = [step.loss for step in Run(compiled, items, config=config(**fields, compile="on"))]
    monkeypatch.setattr(shared_prefix, "_WORTH", 10**9)
    plain = tiny()
    assert losses == pytest.approx(
        [step.loss for step in Run(plain, items, config=config(**fields))], rel=1e-6
    )
    assert of_compiled == pytest.approx(losses, rel=1e-5)
    for name, array in flat(plain).items():
        np.testing.assert_allclose(flat(model)[name], array, atol=1e-4 * np.abs(array).max())
        np.testing.assert_allclose(flat(compiled)[name], array, atol=1e-4 * np.abs(array).max())


def test_noise_is_every_rows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_share(tiny(dropout=0.1))
    shared: list[Any] = []
    monkeypatch.setattr(loop, "share_prefix", lambda gradient, *rest, **named: shared.append(1) or gradient)
    for fields, shares in (({"neftune": 5.0}, 0), ({}, 1)):
        list(Run(tiny(), examples(3), config=config(steps=1, **fields)))
        assert len(shared) == shares


def test_a_model_that_looks_elsewhere_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    real = type(model.model).__call__

    def counted_back(self: Any, ids: mx.array, *args: Any, **named: Any) -> mx.array:
        hidden: mx.array = real(self, ids, *args, **named)
        return hidden * ids.shape[1]

    monkeypatch.setattr(type(model.model), "__call__", counted_back)
    assert not can_share(model)


def test_a_new_adapter_that_looks_at_places_is_found_out(folders: dict[str, Path]) -> None:
    """Its B is zero, so at first it changes nothing."""
    loaded, _ = attached(folders["llama"], METHODS["lora"], trained=False)
    layer = loaded.model.layers[0].self_attn.q_proj
    real = type(layer).__call__

    class Placed(type(layer)):  # type: ignore[misc]
        def __call__(self, x: mx.array) -> mx.array:
            places = mx.arange(x.shape[1])[:, None] + 1.0
            changed: mx.array = self.base(x) + (real(self, x) - self.base(x)) * places
            return changed

    assert can_share(loaded.model)
    before = flat(loaded.model)
    layer.__class__ = Placed
    assert not can_share(loaded.model)
    for name, array in flat(loaded.model).items():
        np.testing.assert_array_equal(array, before[name])


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(st.integers(3, 6), min_size=2, max_size=9), min_size=1, max_size=5),
    front=st.lists(st.integers(3, 6), max_size=70),
    start=st.integers(1, 75),
)
def test_every_target_is_learned_once(rows: list[list[int]], front: list[int], start: int) -> None:
    items = [Example(front + row, min(start, len(front) + len(row) - 1)) for row in rows]
    parts = [part for part in (items[:2], items[2:]) if part]
    step = [make_batch([[item] for item in part], pad_id=0) for part in parts]
    length = shared_length(step, virtual=0)
    assert length == 0 or length * (len(rows) - 1) >= shared_prefix._WORTH
    if not length:
        return
    first = prefix_batch(step, length)
    assert all((whole.ids[:, : length + 1] == first.ids).all() for whole in step)
    left = [drop_prefix(given, length) for given in step]
    assert all(rest.ids.shape[1] >= 2 and rest.label_mask[:, 0].sum() == 0 for rest in left)
    # by place in the row: what the prefix has, and behind it what the rows have
    for place in range(first.ids.shape[1]):
        assert first.label_mask[0, place] == sum(whole.label_mask[:, place].sum() for whole in step)
    for whole, rest in zip(step, left):
        assert (rest.label_mask[:, 1:] == whole.label_mask[:, length + 1 :]).all()
        assert (rest.ids == whole.ids[:, length:]).all()
