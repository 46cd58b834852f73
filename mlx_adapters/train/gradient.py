"""The loss of a batch and its gradient, as one function that can be compiled.

`mx.compile` traces it once for each shape of batch: Python builds no graph after that, and what stands
between two matrix products is computed in one pass. A GPU gains from fewer and larger kernels. On a CPU every
such pass is C++ first, which `g++` translates in about a second (half a minute for a method and model, once,
because the libraries are kept), and the order in which arrays are made and freed needs more memory: two x86
cores gained a twelfth in speed for a fifth more memory, so there it is left to the user.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters import backend
from mlx_adapters.data.batches import Batch
from mlx_adapters.errors import TrainingError, UnsupportedError
from mlx_adapters.train.loss import Targets, targets
from mlx_adapters.train.packing import Packing
from mlx_adapters.virtual import forward

__all__ = ["Gradient", "compiling"]

# Shapes that are kept traced. Each is a graph of ten thousand nodes, a few megabytes.
_SHAPES = 32


class Gradient:
    """(loss, gradients) of batches with respect to what trains in `model`; a loss is a sum over targets."""

    def __init__(self, model: nn.Module, *, packing: Packing | None = None, compiled: bool = False) -> None:
        self.model, self.packing, self.compiled = model, packing, compiled
        # The loss, while it is traced. Kept, it would hold the run that holds this: a circle of references,
        # and the model's memory would not be free when the run is.
        self._losses: list[Callable[[Targets], mx.array]] = []
        self._function = _tracing(model, packing, self._losses)
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()
        if compiled:
            backend.own_kernels()
            # what is not computed yet would become a part of the function, computed again in every step
            mx.eval(model.parameters(), forward(model, mx.array([[1, 2, 3, 4]])))
            self._forget()

    def __call__(self, loss: Callable[[Targets], mx.array], given: Batch) -> tuple[mx.array, Any]:
        """The same `loss` every time: compiled, it is traced once a shape.

        Raises UnsupportedError for a model that cannot be differentiated.
        """
        batch = targets(given)
        arrays = [batch.ids, batch.positions, batch.wanted, batch.weight]
        if self.packing and given.starts is not None:
            arrays.append(mx.array(given.starts[:, :-1]))
        if self.compiled:
            shape = tuple(array.shape for array in arrays)
            if len(self._shapes) >= _SHAPES and shape not in self._shapes:
                self._forget()
            self._shapes.add(shape)
        own = self.model.trainable_parameters()
        self._losses.append(loss)
        try:
            value, gradients = self._function(own, *arrays)
        except ValueError as error:
            if "VJP" not in str(error):
                raise
            name = type(self.model).__module__.rpartition(".")[2]
            raise UnsupportedError(
                f"mlx-lm's {name} model cannot be differentiated, so nothing trains on it ({error})"
            ) from None
        finally:
            self._losses.clear()
            self.model.update(own)  # the trace left its own placeholders behind
        return value, gradients

    def _forget(self) -> None:
        self._shapes.clear()
        trace = _tracing(self.model, self.packing, self._losses)
        self._function = mx.compile(trace, inputs=mx.random.state, outputs=mx.random.state)


def _tracing(
    model: nn.Module, packing: Packing | None, losses: list[Callable[[Targets], mx.array]]
) -> Callable[..., tuple[mx.array, Any]]:
    """The function of arrays that is differentiated, and compiled."""

    def trace(parameters: Any, *arrays: mx.array) -> tuple[mx.array, Any]:
        batch, starts = Targets(*arrays[:4]), arrays[4:]

        def loss(parameters: Any) -> mx.array:
            model.update(parameters)
            return losses[0](batch)

        reading: AbstractContextManager[None] = nullcontext()
        if packing and starts:
            reading = packing.reading(starts[0])
        with reading:
            value: tuple[mx.array, Any] = mx.value_and_grad(loss)(parameters)
        return value

    return trace


@contextmanager
def compiling() -> Iterator[None]:
    """Around an evaluation that may compile: Ctrl-C must not reach the compiler, and its failure is told.

    The signal is not lost: Python hears of it right after.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    except RuntimeError as error:
        if "Compile::eval_cpu" not in str(error) and "shared library" not in str(error):
            raise
        said = " ".join(str(error).split())[-300:]
        raise TrainingError(
            f"the step could not be compiled. Train with --compile off, or see to g++: {said}"
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
