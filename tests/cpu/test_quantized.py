"""Quantized layers on the CPU: the same function as MLX's own, its gradient, its names, its memory."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_adapters import device
from mlx_adapters.cpu import layers, quantized
from mlx_adapters.methods import lora

# (mode, bits, group size): everything that `convert` offers
FORMATS = [("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)] + [
    ("affine", 4, 32),
    ("affine", 4, 128),
    ("mxfp4", 4, 32),
    ("mxfp8", 8, 32),
    ("nvfp4", 4, 16),
]
MANY = 3 * quantized.FEW_ROWS

pytestmark = pytest.mark.skipif(not device.on_cpu(), reason="Metal keeps MLX's own kernels")


class Small(nn.Module):
    """An embedding that is also the head, and a linear layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 128)
        self.inner = nn.Linear(128, 256, bias=True)
        self.outer = nn.Linear(256, 128, bias=False)

    def __call__(self, ids: mx.array) -> Any:
        return self.embed.as_linear(self.outer(nn.silu(self.inner(self.embed(ids)))))


def pair(mode: str = "affine", bits: int = 4, group: int = 64) -> tuple[Small, Small]:
    """The same quantized model as MLX has it, and sped up."""
    models = []
    for _ in range(2):
        mx.random.seed(0)
        model = Small()
        model.inner.bias = mx.random.normal((256,))
        nn.quantize(model, group_size=group, bits=bits, mode=mode)
        models.append(model)
    layers.speed_up(models[1])
    return models[0], models[1]


def ids(rows: int) -> mx.array:
    return mx.array(np.random.default_rng(1).integers(0, 40, (1, rows)))


def close(ours: Any, theirs: Any, *, bound: float = 1e-5) -> None:
    ours, theirs = np.array(ours), np.array(theirs)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * (1 + np.abs(theirs).max()))


@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS)
@pytest.mark.parametrize("rows", [1, quantized.FEW_ROWS - 1, quantized.FEW_ROWS, 50])
def test_values_are_those_of_mlx(mode: str, bits: int, group: int, rows: int) -> None:
    theirs, ours = pair(mode, bits, group)
    close(ours(ids(rows)), theirs(ids(rows)))


@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS)
def test_gradient_is_that_of_the_written_out_layer(mode: str, bits: int, group: int) -> None:
    _, ours = pair(mode, bits, group)
    layer = ours.inner
    weight = quantized.dequantize(layer)
    x = mx.random.normal((2, MANY, 128))
    target = mx.random.normal((2, MANY, 256))
    got = mx.grad(lambda x: ((layer(x) - target) ** 2).sum())(x)
    wanted = mx.grad(lambda x: ((x @ weight.T + layer.bias - target) ** 2).sum())(x)
    close(got, wanted)
    assert np.abs(np.array(got)).max() > 1e-3


def test_gradient_passes_through_a_stack_and_under_compile() -> None:
    theirs, ours = pair()
    for model in (theirs, ours):
        mx.random.seed(3)
        model.freeze()
        for name in ("inner", "outer"):
            layer = lora.Layer(model[name], rank=4, scale=2.0, dropout=0.0)
            layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.1
            model[name] = layer

    def gradients(model: Any, *, compiled: bool = False) -> dict[str, mx.array]:
        def loss(parameters: Any) -> Any:
            model.update(parameters)
            return (model(ids(MANY)) ** 2).mean()

        function = mx.grad(loss)
        start = model.trainable_parameters()
        result = dict(tree_flatten((mx.compile(function) if compiled else function)(start)))
        model.update(start)
        return result

    wanted, got, compiled = gradients(theirs), gradients(ours), gradients(ours, compiled=True)
    assert set(got) == set(wanted) == set(compiled)
    assert len(got) == 4
    for name in wanted:
        close(got[name], wanted[name], bound=1e-4)
        close(compiled[name], wanted[name], bound=1e-4)
        assert np.abs(np.array(wanted[name])).max() > 0


def test_names_arrays_and_types_stay() -> None:
    theirs, ours = pair()
    wanted, got = dict(tree_flatten(theirs.parameters())), dict(tree_flatten(ours.parameters()))
    assert set(got) == set(wanted)
    assert all(mx.array_equal(got[name], wanted[name]).item() for name in wanted)
    assert isinstance(ours.inner, nn.QuantizedLinear)
    assert isinstance(ours.embed, nn.QuantizedEmbedding)
    assert type(ours.inner) is quantized.QuantizedLinear
    assert type(ours.embed) is quantized.QuantizedEmbedding


def test_speeding_up_twice_changes_nothing_and_plain_layers_stay() -> None:
    _, ours = pair()
    layers.speed_up(ours)
    assert type(ours.inner) is quantized.QuantizedLinear
    plain = Small()
    layers.speed_up(plain)
    assert type(plain.inner) is nn.Linear


def test_half_precision_input_keeps_its_type() -> None:
    _, ours = pair()
    for dtype in (mx.float16, mx.bfloat16):
        x = mx.random.normal((MANY, 128)).astype(dtype)
        ours.inner.scales, ours.inner.biases = (
            a.astype(dtype) for a in (ours.inner.scales, ours.inner.biases)
        )
        ours.inner.bias = ours.inner.bias.astype(dtype)
        assert ours.inner(x).dtype == dtype


def test_the_written_out_weights_are_not_kept_for_the_gradient() -> None:
    """Neither kept from the forward pass nor written out ahead of their use: a few are alive at a time."""
    side, depth = 512, 64
    stack = nn.Sequential(
        *(nn.QuantizedLinear(side, side, bias=False, group_size=64, bits=4) for _ in range(depth))
    )
    layers.speed_up(stack)
    mx.eval(stack.parameters())
    mx.synchronize()
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(lambda x: stack(x).sum())(mx.ones((MANY, side))))
    assert mx.get_peak_memory() - held < depth * side * side * 4 / 4


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(7, 128), (3, 5, 256)])
def test_our_way_of_writing_out_is_mlx_s_bit_for_bit(
    bits: int, group_size: int, shape: tuple[int, ...]
) -> None:
    from mlx_adapters.cpu.quantized import dequantize

    weight, scales, biases = mx.quantize(
        mx.random.normal(shape, key=mx.random.key(bits)), group_size=group_size, bits=bits
    )
    layer = nn.QuantizedLinear(group_size, 1, bias=False, group_size=group_size, bits=bits)
    layer.weight, layer.scales, layer.biases = weight, scales, biases
    theirs = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, dtype=mx.float32)
    assert mx.array_equal(dequantize(layer), theirs)
