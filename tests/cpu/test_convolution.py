"""Short convolutions as sums of shifted rows, against MLX's."""

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
import samples

from mlx_adapters import device
from mlx_adapters.cpu import layers
from mlx_adapters.cpu.convolution import ShortConv1d, is_short

pytestmark = pytest.mark.skipif(not device.on_cpu(), reason="only a CPU computes with these")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("time", [1, 7])
def test_values_and_gradients_are_mlxs(bias: bool, time: int) -> None:
    plain = nn.Conv1d(6, 6, 4, groups=6, bias=bias)
    plain.update({"bias": mx.random.normal((6,))} if bias else {})
    ours = copy.deepcopy(plain)
    assert is_short(ours)
    ours.__class__ = ShortConv1d
    x = mx.random.normal((2, time + 3, 6), key=mx.random.key(3))
    weight = mx.random.normal((2, time, 6), key=mx.random.key(4))

    def slopes(layer: nn.Module) -> list[mx.array]:
        def loss(parameters: dict[str, mx.array], x: mx.array) -> mx.array:
            layer.update(parameters)
            return (layer(x) * weight).sum()

        value, (own, of_x) = mx.value_and_grad(loss, argnums=(0, 1))(layer.parameters(), x)
        return [value, of_x, *(own[name] for name in sorted(own))]

    for found, expected in zip(slopes(ours), slopes(plain), strict=True):
        assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5).item()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(6, 6, 4, groups=6, padding=3),
        nn.Conv1d(6, 6, 4, groups=6, dilation=2),
        nn.Conv1d(6, 6, 4, groups=3),
        nn.Conv1d(6, 12, 4, groups=6),
        nn.Conv1d(6, 6, 32, groups=6),
    ],
)
def test_other_convolutions_stay(layer: nn.Conv1d) -> None:
    assert not is_short(layer)


def test_a_model_of_short_convolutions_computes_the_same() -> None:
    ids = mx.array([[3, 1, 4, 1, 5]])
    plain, ours = samples.sample("lfm2"), samples.sample("lfm2")
    layers.speed_up(ours)
    assert any(type(module) is ShortConv1d for module in ours.modules())
    assert mx.allclose(ours(ids), plain(ids), atol=1e-5).item()
