"""Compiled gradient functions: `mx.compile` traces each once for each shape of batch.

Python builds no graph after that, and what stands between two matrix products is computed in one pass. A GPU
gains from fewer and larger kernels. On a CPU every such pass is C++ first, which `g++` translates in about a
second (half a minute for a method and model, once, because the libraries are kept), and the order in which
arrays are made and freed needs more memory: two x86 cores gained a twelfth in speed for a fifth more memory,
so there it is left to the user.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_adapters.adapter.call import call_model
from mlx_adapters.cpu import kernels
from mlx_adapters.data.batches import Batch
from mlx_adapters.errors import TrainingError
from mlx_adapters.train.step import Parameters

__all__ = ["Compiled", "compiling", "prepare"]

# Shapes that are kept traced. Each is a graph of ten thousand nodes, a few megabytes.
_SHAPES = 32

Prefix = TypeVar("Prefix")
Result = TypeVar("Result")


class Compiled(Generic[Prefix, Result]):
    """`function` of (parameters, prefix, batch), traced once for each shape of the last two.

    `tokens` and `supervised` of a batch are not there in the function: they would be constants of the trace.
    """

    def __init__(self, function: Callable[[Parameters, Prefix, Batch], Result]) -> None:
        self.function = function
        self.shapes: set[tuple[tuple[int, ...], ...]] = set()
        self._forget()

    def __call__(self, parameters: Parameters, prefix: Prefix, batch: Batch) -> Result:
        arrays = batch.arrays
        shape = tuple(array.shape for _, array in tree_flatten([prefix, arrays]))
        if len(self.shapes) >= _SHAPES and shape not in self.shapes:
            self._forget()
        self.shapes.add(shape)
        return self._traced(parameters, prefix, arrays)

    def _forget(self) -> None:
        function, state = self.function, mx.random.state

        def of_arrays(parameters: Parameters, prefix: Prefix, arrays: dict[str, Any]) -> Result:
            return function(parameters, prefix, Batch(**arrays, tokens=0, supervised=0))

        self.shapes.clear()
        self._traced = mx.compile(of_arrays, inputs=state, outputs=state)


def prepare(model: nn.Module) -> None:
    """Before anything of `model` is traced. What is not computed yet would become a part of the function, and
    be computed again in every step."""
    kernels.own_kernels()
    mx.eval(model.parameters(), call_model(model, mx.array([[1, 2, 3, 4]])))


@contextmanager
def compiling() -> Iterator[None]:
    """Around an evaluation that may compile: Ctrl-C must not reach the compiler, and its failure is told.

    The signal is not lost: Python receives it right after.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    except RuntimeError as error:
        if "Compile::eval_cpu" not in str(error) and "shared library" not in str(error):
            raise
        message = " ".join(str(error).split())[-300:]
        raise TrainingError(
            f"the step could not be compiled. Train with --compile off, or see to g++: {message}"
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
