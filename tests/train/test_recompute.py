"""Gradient checkpointing: the same loss and gradients, whatever the method, in less memory."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import trials
from cases import METHODS
from mlx.utils import tree_flatten
from small_run import llama_with

from mlx_adapters import adapter
from mlx_adapters.data.batches import make_batch
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import UnsupportedError
from mlx_adapters.methods.dropout import Dropout
from mlx_adapters.train.loss import split_head
from mlx_adapters.train.recompute import Recompute
from mlx_adapters.train.step import value_and_grad


def gradients(model: Any, recompute: Recompute | None = None) -> tuple[float, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    rows = [[Example(list(map(int, rng.integers(3, 48, n))), 2)] for n in (9, 14, 5)]
    given = make_batch(rows, pad_id=0)
    gradient = value_and_grad(model, split_head(model))
    if recompute:
        gradient = recompute(gradient)
    mx.random.seed(7)
    loss, (grads, _) = gradient(model.trainable_parameters(), ([], []), given)
    return loss.item(), {name: np.array(array) for name, array in tree_flatten(grads)}


# what `prepare` makes needs a model folder; test_fusion.py tests its gradient checkpointing
@pytest.mark.parametrize(
    "case",
    [case for case, method in METHODS.items() if "llama" not in method.refused and method.prepare is None],
)
def test_same_loss_and_gradients(case: str) -> None:
    """Prefix gradients are exactly zero with mlx-lm's checkpointing; here every method keeps its own."""
    model = llama_with(case)
    loss, plain = gradients(model)
    recompute = Recompute(model)
    assert recompute.blocks == 3
    again, recomputed = gradients(model, recompute)
    assert again == pytest.approx(loss, rel=1e-6)
    assert set(plain) == set(recomputed)
    for name, gradient in plain.items():
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(recomputed[name], gradient, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("name", ["afm7", "gemma3n", "gemma4_text", "hunyuan", "kimi_k3"])
def test_what_blocks_hand_on_beside_their_result_keeps_its_gradient(name: str) -> None:
    """Keys and values as arguments and results, in a cache, or in an object of the model's own."""
    model = trials.attached(name, "lora")
    trials._change(model)
    model.train()
    loss, plain = gradients(model)
    again, recomputed = gradients(model, Recompute(model))
    assert again == pytest.approx(loss, rel=1e-6)
    for path, gradient in plain.items():
        np.testing.assert_allclose(recomputed[path], gradient, atol=1e-5 * np.abs(gradient).max())


def handing_on(call: Callable[[list[Any], mx.array], mx.array]) -> Any:
    """A model whose blocks return what `call` makes of (their results so far, their own)."""
    model, results = llama_with("lora"), []
    kind = type(model.layers[0])

    class Handing(kind):  # type: ignore[misc]
        def __call__(self, *args: Any, **named: Any) -> mx.array:
            results.append(super().__call__(*args, **named))
            return call(results[:-1], results[-1])

    for block in model.layers:
        block.__class__ = Handing
    return model


def test_blocks_whose_gradient_would_be_wrong_are_refused() -> None:
    """What a block takes from a list is no argument: nothing tells it that a gradient belongs there."""
    model = handing_on(lambda earlier, own: own + earlier[-1] if len(earlier) % 3 else own)
    with pytest.raises(
        UnsupportedError, match=r"llama cannot .* gradient of .* would be wrong. Leave it off"
    ):
        Recompute(model)


def test_blocks_that_cannot_be_traced_again_are_refused() -> None:
    def once(earlier: list[Any], own: mx.array) -> mx.array:
        if len(earlier) > 10:  # nine calls of blocks come before
            raise RuntimeError("once more than it can")
        return own

    with pytest.raises(UnsupportedError, match=r"llama cannot .* \(once more than it can\). Leave it off"):
        Recompute(handing_on(once))


def test_dropout_draws_the_same_mask_in_the_second_pass() -> None:
    """A finite difference sees the mask of the forward pass; the gradient must be of that one."""
    model = llama_with("lora")
    for layer in adapter.layers(model).values():
        layer.dropout = Dropout(0.5)
    recompute = Recompute(model)
    model.train()
    _, grads = gradients(model, recompute)
    layer = adapter.layers(model)["model.layers.1.mlp.up_proj"]
    direction = mx.random.normal(layer.lora_a.shape)
    start, width, values = layer.lora_a, 1e-2, []
    for sign in (1, -1):
        layer.lora_a = start + sign * width * direction
        values.append(gradients(model, recompute)[0])
    slope = (values[0] - values[1]) / (2 * width)
    expected = float((grads["model.layers.1.mlp.up_proj.lora_a"] * np.array(direction)).sum())
    assert expected == pytest.approx(slope, rel=2e-2)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no list of blocks"):
        Recompute(nn.Linear(2, 2))
