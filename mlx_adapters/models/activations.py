"""The activation of every MLP as the configuration names it.

mlx-lm's files mostly compute one function whatever the configuration says. Which one is measured: a copy of
each MLP, whose linear layers are replaced by fixed numbers, is run on them. Where that is not the function
that the configuration names, the MLP gets it.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_adapters.errors import UnsupportedError
from mlx_adapters.models.architectures.row import Config
from mlx_adapters.models.reference import reference
from mlx_adapters.rebind import replace_call

__all__ = ["Activation", "activation", "correct_activations"]

Function = Callable[[mx.array], mx.array]


def _quick_gelu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(1.702 * x)


def _leaky_relu(x: mx.array) -> mx.array:
    return mx.where(x > 0, x, 0.01 * x)


def _linear(x: mx.array) -> mx.array:
    return x


_FUNCTIONS: dict[str, Function] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": nn.gelu,
    "gelu_python": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_fast": nn.gelu_approx,
    "gelu_accurate": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "gelu_python_tanh": nn.gelu_approx,
    "quick_gelu": _quick_gelu,
    "leaky_relu": _leaky_relu,
    "linear": _linear,
    "mish": nn.mish,
    "relu": nn.relu,
    "relu2": nn.relu2,
    "relu6": nn.relu6,
    "sigmoid": mx.sigmoid,
    "tanh": mx.tanh,
}
"""By transformers' names."""

_TRIED = (-4.0, -2.5, -1.2, -0.4, 0.3, 0.9, 1.7, 3.1)  # where the functions differ from each other
_UP = (0.5, -1.5, 2.0, 0.7, -0.3, 1.1, -0.8, 1.3)


def activation(config_field: str, name: str) -> Function:
    """The function of an activation's name in a config; UnsupportedError names the field."""
    if name not in _FUNCTIONS:
        raise UnsupportedError(
            f"config.json: field {config_field!r} is {name!r}, which is not implemented in MLX here"
        )
    return _FUNCTIONS[name]


def correct_activations(model: Any, config: Config) -> None:
    """Give every MLP of `model` the activation that transformers gives it for `config`.

    Raises UnsupportedError where the configuration asks for one that is not the architecture's usual, and a
    layer is found that cannot be given it.
    """
    about = reference(config["model_type"])
    if about.activation is None:
        return
    field, usual = about.activation
    name = config.get(field) or usual
    name = about.misnamed.get(name, name)
    if usual not in _FUNCTIONS and name == usual:
        return  # a function of the architecture's own
    wanted = activation(field, name)
    given = _give(model, wanted)
    unusual = usual not in _FUNCTIONS or _names(_values(wanted)) != _names(_values(_FUNCTIONS[usual]))
    mixing = field != "mlp_hidden_act" and _convolves(model)  # there the same field is for both
    if unusual and (not given or mixing):
        raise UnsupportedError(
            f"config.json: field {field!r} is {name!r}, but mlx-lm's {config['model_type']} always uses "
            f"{usual}"
        )


def _give(model: Any, wanted: Function) -> int:
    """Make every MLP compute `wanted`; the number of those that do so now."""
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

    given, asked = 0, _names(_values(wanted))
    for module in list(model.modules()):
        if isinstance(module, (SwitchGLU, SwitchMLP)):
            gated = isinstance(module, SwitchGLU)
            if (computed := _computed_by_experts(module.activation, gated)) is None:
                continue
            if computed != asked:
                module.activation = Activation(wanted)
            given += 1
        elif found := _computed(module):
            form, computed = found
            if computed != asked:
                module.__class__ = _computing(type(module), form, wanted)
            given += 1
    return given


def _convolves(model: Any) -> bool:
    """Whether a layer mixes tokens by a convolution, whose activation the same field names."""
    return any(isinstance(module, nn.Conv1d) for module in model.modules())


# Which function it is --------------------------------------------------------------------------------------


def _values(function: Function) -> np.ndarray:
    return np.array(function(mx.array(_TRIED)))


@cache
def _known() -> dict[str, np.ndarray]:
    return {name: _values(function) for name, function in _FUNCTIONS.items()}


def _names(values: np.ndarray) -> frozenset[str]:
    """The functions that have these values at `_TRIED`."""
    return frozenset(name for name, known in _known().items() if np.allclose(known, values, 1e-5, 1e-5))


# MLPs ------------------------------------------------------------------------------------------------------

Form = tuple[str, str, str]
"""The names of the layers gate, up and down; without a gate it is empty, and where one layer computes both
gate and up, up is empty."""


def _computed(module: Any) -> tuple[Form, frozenset[str]] | None:
    """How `module` is an MLP, and the functions it may compute; None where it is none that is known."""
    for form in _forms(module):
        values = _measured(module, form)
        if values is not None and (names := _names(values)):
            return form, names
    return None


def _forms(module: Any) -> Iterator[Form]:
    """The ways in which `module` may be an MLP, by the shapes of its linear layers."""
    shapes = {n: layer.weight.shape for n, layer in module.children().items() if isinstance(layer, nn.Linear)}
    if len(shapes) == 3:
        for down, (width, inner) in shapes.items():
            gate, up = (name for name in shapes if name != down)
            if shapes[gate] == shapes[up] == (inner, width):
                yield gate, up, down
                yield up, gate, down
    elif len(shapes) == 2:
        for first, last in (tuple(shapes), tuple(shapes)[::-1]):
            inner, width = shapes[first]
            if shapes[last] == (width, inner):
                yield "", first, last
            elif shapes[last] == (width, inner // 2):
                yield first, "", last


def _measured(module: Any, form: Form) -> np.ndarray | None:
    """What `module` computes of `_TRIED` as an MLP of that form; None where it is no such MLP."""
    gate, up, down = form
    if not gate:
        return _run(module, {up: np.array(_TRIED)}, down)
    results = []
    for scale in (1.0, 2.0):
        tried, times = np.array(_TRIED), scale * np.array(_UP)
        merged = {gate: np.concatenate([tried, times])}
        results.append(_run(module, {gate: tried, up: times} if up else merged, down))
    one, two = results
    if one is None or two is None or not np.allclose(2 * one, two, 1e-5):
        return None  # it is not linear in up
    return np.asarray(one / np.array(_UP))


def _run(module: Any, outputs: dict[str, np.ndarray], down: str) -> np.ndarray | None:
    """What comes out of `module` when its linear layers give `outputs`, and `down`, the last that is called,
    what it is given; None where they are called otherwise."""
    kind: Any = type(module)
    copy = kind.__new__(kind)
    copy.__dict__.update(module.__dict__)
    dict.update(copy, module)
    called: list[str] = []

    def stand_in(name: str, values: mx.array | None) -> Callable[[mx.array], mx.array]:
        def call(x: mx.array) -> mx.array:
            called.append(name)
            return x if values is None else values

        return call

    for name, values in outputs.items():
        dict.__setitem__(copy, name, stand_in(name, mx.array(values, mx.float32)))
    dict.__setitem__(copy, down, stand_in(down, None))
    try:
        result = np.array(copy(mx.zeros((1, 1))))
    except Exception:  # a module of another kind may want and do anything
        return None
    in_order = sorted(called) == sorted((*outputs, down)) and called[-1] == down
    return result if in_order and result.shape == (len(_TRIED),) else None


def _computing(base: Any, form: Form, function: Function) -> type:
    """An MLP of that form with that function."""
    gate, up, down = form

    def gated(self: Any, x: mx.array) -> mx.array:
        result: mx.array = self[down](function(self[gate](x)) * self[up](x))
        return result

    def merged(self: Any, x: mx.array) -> mx.array:
        first, second = mx.split(self[gate](x), 2, axis=-1)
        result: mx.array = self[down](function(first) * second)
        return result

    def ungated(self: Any, x: mx.array) -> mx.array:
        result: mx.array = self[down](function(self[up](x)))
        return result

    call = ungated if not gate else gated if up else merged
    return replace_call(base, call)


# Stacked experts -------------------------------------------------------------------------------------------


class Activation(nn.Module):
    """The function inside stacked experts: of (up, gate), or of what up gives where there is no gate."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self._function = function

    def __call__(self, x: mx.array, gate: mx.array | None = None) -> mx.array:
        return self._function(x) if gate is None else self._function(gate) * x


def _computed_by_experts(function: Any, gated: bool) -> frozenset[str] | None:
    tried, times = mx.array(_TRIED), mx.array(_UP)
    try:
        values = function(times, tried) / times if gated else function(tried)
    except Exception:  # a model file's own may want more
        return None
    return _names(np.array(values)) or None
