"""Loss and gradients of a set of batches, and how far two such results are apart."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_adapters.data.batches import Batch
from mlx_adapters.methods.dropout import Dropout
from mlx_adapters.train.loop import Run

Found = tuple[float, dict[str, np.ndarray]]  # a loss, and gradients by path


def of_batches(run: Run, given: list[Batch], *, together: bool = False, share: bool = False) -> Found:
    """Loss and gradients summed over the batches of a step, or over steps of a batch; without dropout.

    In float64, whose rounding hides nothing.
    """
    with mx.stream(mx.cpu):
        run.model.set_dtype(mx.float64)
        return summed(run, given, together, share)


def summed(run: Run, given: list[Batch], together: bool = False, share: bool = False) -> Found:
    for module in run.model.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    run.model.train()  # only then are blocks recomputed
    gradient = run.gradient_fn(None, share=share)
    total, sums = 0.0, {}
    for window in [given] if together else [[batch] for batch in given]:
        loss, (grads, _) = gradient(run.model.trainable_parameters(), ([], []), window)
        total += float(loss)
        for path, array in tree_flatten(grads):
            sums[path] = sums.get(path, 0.0) + np.array(array, dtype=np.float64)
    return total, sums


def same(left: Found, right: Found, within: float = 1e-12) -> None:
    """The losses, which are computed in float32, within 1e-6; the gradients much closer."""
    assert left[0] == pytest.approx(right[0], rel=1e-6)
    assert left[1].keys() == right[1].keys()
    assert all(np.abs(gradient).max() > 0 for gradient in left[1].values())
    assert distance(left, right) < within


def distance(left: Found, right: Found) -> float:
    """How far the gradients are apart, as vectors of all arrays, of the length of one."""
    length = np.sqrt(sum(np.square(gradient).sum() for gradient in left[1].values()))
    apart = np.sqrt(sum(np.square(right[1][path] - gradient).sum() for path, gradient in left[1].items()))
    return float(apart / length)
