"""Packing and bucketing: how a fixed set of items is laid out never changes its loss or gradient."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapted import attached
from cases import ARCHITECTURES, METHODS
from gradients import distance, of_batches, same, summed
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from small_run import config, examples, tiny

from mlx_adapters.data.batches import batches
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import UnsupportedError
from mlx_adapters.train.length import total_steps
from mlx_adapters.train.loop import Run
from mlx_adapters.train.packing import packing


def rows(count: int = 9) -> list[Example]:
    rng = np.random.default_rng(5)
    lengths = rng.integers(5, 25, count)
    return [Example(list(map(int, rng.integers(4, 64, n))), int(n) // 3) for n in lengths]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_equals_apart(arch: str, folders: dict[str, Path]) -> None:
    items = rows()
    loaded, _ = attached(folders[arch], METHODS["lora"], trained=True)
    apart = of_batches(
        Run(loaded.model, items, config=config()), batches(items, batch_size=1, pad_id=0, multiple=1)
    )
    packed = Run(loaded.model, items, config=config(packing=True, max_length=64))
    given = batches(items, batch_size=2, pad_id=0, pack=64)
    assert sum(len(batch.ids) for batch in given) < len(items) / 2
    same(apart, of_batches(packed, given))


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_packing_rounds_no_more_than_padding_does(arch: str, folders: dict[str, Path]) -> None:
    """In float32 sums come out otherwise in products of other shapes, whatever the reason for the shapes."""
    items = rows()
    loaded, _ = attached(folders[arch], METHODS["lora"], trained=True)
    plain = Run(loaded.model, items, config=config())
    apart = summed(plain, batches(items, batch_size=1, pad_id=0, multiple=1))
    padded = summed(plain, batches(items, batch_size=3, pad_id=0, multiple=32))
    run = Run(loaded.model, items, config=config(packing=True, max_length=64))
    packed = summed(run, batches(items, batch_size=2, pad_id=0, pack=64))
    assert 0 < distance(apart, packed) < 2 * distance(apart, padded) < 1e-5


@pytest.mark.parametrize("case", ["dora", "series", "seq_bn", "loreft", "ia3"])
def test_packed_equals_apart_for_every_kind_of_method(case: str, folders: dict[str, Path]) -> None:
    items = rows()
    loaded, _ = attached(folders["llama"], METHODS[case], trained=True)
    apart = of_batches(Run(loaded.model, items, config=config()), batches(items, batch_size=1, pad_id=0))
    again = config(packing=True, max_length=64, gradient_checkpointing=True)
    loaded, _ = attached(folders["llama"], METHODS[case], trained=True)
    same(
        apart,
        of_batches(Run(loaded.model, items, config=again), batches(items, batch_size=2, pad_id=0, pack=64)),
    )


@pytest.mark.parametrize("case", ["prefix", "prompt"])
def test_virtual_tokens_are_refused(case: str, folders: dict[str, Path]) -> None:
    loaded, _ = attached(folders["llama"], METHODS[case], trained=True)
    with pytest.raises(UnsupportedError, match="virtual tokens"):
        packing(loaded.model)


def test_a_model_that_mixes_neighbours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the masks do not reach (a convolution, a state) shows when it is tried."""
    model = tiny()
    real = type(model.model).__call__

    def mixing(self: Any, *args: Any, **named: Any) -> mx.array:
        hidden: mx.array = real(self, *args, **named)
        return hidden + mx.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))

    monkeypatch.setattr(type(model.model), "__call__", mixing)
    with pytest.raises(UnsupportedError, match=r"llama cannot keep examples of one row apart.*differ"):
        packing(model)


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(3, 30), min_size=1, max_size=12),
    size=st.integers(1, 6),
    multiple=st.sampled_from([1, 8, 16]),
    epoch=st.integers(0, 3),
)
def test_bucketing_never_changes_the_gradient(
    lengths: list[int], size: int, multiple: int, epoch: int
) -> None:
    rng = np.random.default_rng(sum(lengths))
    items = [Example(list(map(int, rng.integers(3, 48, n))), max(1, n // 2)) for n in lengths]
    run = Run(tiny(), items, config=config())
    for path, array in tree_flatten(run.model.trainable_parameters()):
        run.model.load_weights([(path, array + 0.1)], strict=False)
    one_by_one = of_batches(run, batches(items, batch_size=1, pad_id=0, shuffle=False, multiple=1))
    same(
        one_by_one, of_batches(run, batches(items, batch_size=size, pad_id=0, epoch=epoch, multiple=multiple))
    )


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60),
    size=st.integers(1, 5),
    pack=st.integers(40, 90),
    processes=st.integers(1, 4),
)
def test_nothing_is_lost_or_repeated(lengths: list[int], size: int, pack: int, processes: int) -> None:
    """Whatever the layout, every token is read once; the processes' shares make up the batch."""
    items = [Example(list(range(100 * i + 5, 100 * i + 5 + n)), 1) for i, n in enumerate(lengths)]
    wanted = sorted(token for item in items for token in item.ids)
    for length in (None, pack):
        found: list[int] = []
        supervised = 0
        for rank in range(processes):
            for batch in batches(items, batch_size=size, pad_id=0, pack=length, share=(rank, processes)):
                assert batch.ids.shape[1] <= 8 + (length or 40)
                if batch.label_mask.any():
                    ids = np.array(batch.ids)
                    found += ids[ids > 0].tolist()
                supervised += int(batch.label_mask.sum())
        assert sorted(found) == wanted
        assert supervised == sum(len(item.ids) - 1 for item in items)


def test_a_packed_run_trains_and_counts_its_steps() -> None:
    items = examples(40)
    settings = config(packing=True, max_length=64, batch_size=2, steps=None, epochs=3)
    steps = list(Run(tiny(), items, config=settings))
    assert len(steps) == total_steps(items, settings)
    assert len(steps) < 3 * 40 / 2 / 3
    assert sum(step.tokens for step in steps) == 3 * sum(len(item.ids) for item in items)
    assert steps[-1].loss < steps[0].loss
