"""LN tuning on the norms of state-space and linear-attention blocks, which are given a gate as well."""

import mlx.core as mx
import mlx.nn as nn
import pytest
import samples
from mlx.utils import tree_flatten

from mlx_adapters import adapter, methods
from mlx_adapters.adapter.call import call_model
from mlx_adapters.methods.ln_tuning import Layer


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next", "mamba2", "nemotron_h", "granitemoehybrid"])
def test_a_gated_norm_trains(name: str) -> None:
    model = samples.sample(name)
    expected = model(samples.IDS)
    placed = adapter.attach(model, methods.make("ln_tuning", {}), model_type=name)
    gated = [path for path, layer in placed.items() if "gated" in type(layer.base).__name__.lower()]
    assert gated
    assert mx.abs(model(samples.IDS) - expected).max().item() <= 1e-5 * mx.abs(expected).max().item()

    def loss() -> mx.array:
        logits = call_model(model, samples.IDS[:, :-1])
        return nn.losses.cross_entropy(logits, samples.IDS[:, 1:]).mean()

    gradients = dict(tree_flatten(nn.value_and_grad(model, loss)()[1]))
    for path in gated:
        layer = placed[path]
        assert isinstance(layer, Layer)
        assert mx.abs(gradients[f"{path}.own.weight"]).max().item() > 0
        layer.own.weight = layer.own.weight * 1.5
    assert mx.abs(model(samples.IDS) - expected).max().item() > 1e-3 * mx.abs(expected).max().item()
