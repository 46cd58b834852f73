"""The loss of a step and its gradient, made of functions that can be compiled.

`mx.compile` traces each once for each shape of batch: Python builds no graph after that, and what stands
between two matrix products is computed in one pass. A GPU gains from fewer and larger kernels. On a CPU every
such pass is C++ first, which `g++` translates in about a second (half a minute for a method and model, once,
because the libraries are kept), and the order in which arrays are made and freed needs more memory: two x86
cores gained a twelfth in speed for a fifth more memory, so there it is left to the user.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_adapters.adapter.call import call_model, needs_cache, virtual_ids
from mlx_adapters.cpu import kernels
from mlx_adapters.data.batches import Batch
from mlx_adapters.errors import TrainingError, UnsupportedError
from mlx_adapters.train.loss import Targets, targets
from mlx_adapters.train.packing import Packing
from mlx_adapters.train.shared_prefix import (
    States,
    after,
    going_on,
    opening,
    reading,
    shared_length,
    states_in,
    untrained,
)

__all__ = ["Gradient", "Loss", "compiling"]

Loss = Callable[[Targets, list[Any] | None], mx.array]
"""The summed loss of a batch, whose rows go on behind the given cache."""

# Shapes that are kept traced. Each is a graph of ten thousand nodes, a few megabytes.
_SHAPES = 32


class Gradient:
    """(loss, gradients) of the batches of a step with respect to what trains in `model`; a loss is a sum over
    targets. Where it `shares`, what all rows begin with is computed once (see shared_prefix.py)."""

    def __init__(
        self,
        model: nn.Module,
        *,
        packing: Packing | None = None,
        compiled: bool = False,
        shares: bool = False,
    ) -> None:
        self.model, self.packing, self.compiled, self.shares = model, packing, compiled, shares
        # The loss, while it is traced. Kept, it would hold the run that holds this: a circle of references,
        # and the model's memory would not be free when the run is.
        self._losses: list[Loss] = []
        needs_cache(model)  # is tried before anything is traced
        self._fixed = untrained(model) if shares else 0
        self._virtual = len(virtual_ids(model))
        self._functions: dict[str, Callable[..., Any]] = {}
        self._shapes: set[Any] = set()
        if compiled:
            kernels.own_kernels()
            # what is not computed yet would become a part of the function, computed again in every step
            mx.eval(model.parameters(), call_model(model, mx.array([[1, 2, 3, 4]])))
        self._forget()

    def __call__(self, loss: Loss, window: Sequence[Batch]) -> tuple[mx.array, Any]:
        """The same `loss` every time: compiled, it is traced once a shape.

        Raises UnsupportedError for a model that cannot be differentiated.
        """
        length = shared_length(window, virtual=self._virtual) if self.shares else 0
        own = self.model.trainable_parameters()
        self._losses.append(loss)
        try:
            return self._shared(own, window, length) if length else self._apart(own, [], window)[:2]
        except ValueError as error:
            if "VJP" not in str(error):
                raise
            name = type(self.model).__module__.rpartition(".")[2]
            raise UnsupportedError(
                f"mlx-lm's {name} model cannot be differentiated, so nothing trains on it ({error})"
            ) from None
        finally:
            self._losses.clear()
            self.model.update(own)  # the traces left their own placeholders behind

    def _shared(self, own: Any, window: Sequence[Batch], length: int) -> tuple[mx.array, Any]:
        first = opening(window, length)
        batch = targets(first)
        states = self._call("read", own, batch.ids[:, :-1])
        total, grads, slopes = self._apart(own, states, [after(given, length) for given in window])
        supervised = [batch.positions, batch.wanted, batch.weight] if first.targets else []
        value, grad = self._call("open", own, slopes, batch.ids, *supervised)
        return total + value, tree_map(mx.add, grads, grad)

    def _apart(self, own: Any, states: States, window: Sequence[Batch]) -> tuple[mx.array, Any, Any]:
        """(loss, gradient, that with respect to the states that move), one batch after the other."""
        total, sums = mx.array(0.0), None
        for given in window:
            batch = targets(given)
            arrays = [batch.ids, batch.positions, batch.wanted, batch.weight]
            if self.packing and given.starts is not None:
                arrays.append(mx.array(given.starts[:, :-1]))
            value, grads = self._call("rows", own, states[self._fixed :], states[: self._fixed], *arrays)
            sums = grads if sums is None else tree_map(mx.add, sums, grads)
            total = total + value
            if len(window) > 1:
                mx.eval(total, sums)  # else the activations of all of them are alive together
        assert sums is not None, "a step has a batch"
        return total, *sums

    def _call(self, name: str, *given: Any) -> Any:
        if self.compiled:
            shape = name, tuple(array.shape for _, array in tree_flatten(given[1:]))
            if len(self._shapes) >= _SHAPES and shape not in self._shapes:
                self._forget()
            self._shapes.add(shape)
        return self._functions[name](*given)

    def _forget(self) -> None:
        self._shapes.clear()
        self._functions = _tracing(self.model, self.packing, self._losses)
        if self.compiled:
            state = mx.random.state
            for name, function in self._functions.items():
                self._functions[name] = mx.compile(function, inputs=state, outputs=state)


def _tracing(model: nn.Module, packing: Packing | None, losses: list[Loss]) -> dict[str, Callable[..., Any]]:
    """The functions of arrays that are compiled."""

    def rows(parameters: Any, moving: States, fixed: States, *arrays: mx.array) -> tuple[mx.array, Any]:
        """(loss, (its gradient, that with respect to `moving`)) of rows that go on behind these states."""
        batch, starts = Targets(*arrays[:4]), arrays[4:]

        def loss(parameters: Any, moving: States) -> mx.array:
            model.update(parameters)
            states = fixed + moving
            return losses[0](batch, going_on(states) if states else None)

        with packing.reading(starts[0]) if packing and starts else nullcontext():
            found: tuple[mx.array, Any] = mx.value_and_grad(loss, argnums=(0, 1))(parameters, moving)
        return found

    def read(parameters: Any, ids: mx.array) -> States:
        """The states of the shared tokens."""
        model.update(parameters)
        caches = reading(model)
        call_model(model, ids, cache=caches)
        return states_in(caches)

    def open(parameters: Any, slopes: States, *arrays: mx.array) -> tuple[mx.array, Any]:
        """(loss of the shared tokens, the gradient of all that they do), `slopes` being the rows'."""

        def loss(parameters: Any) -> tuple[mx.array, mx.array]:
            model.update(parameters)
            caches, own, onward = reading(model), mx.array(0.0), mx.array(0.0)
            if len(arrays) > 1:
                own = losses[0](Targets(*arrays), caches)
            else:
                call_model(model, arrays[0][:, :-1], cache=caches)
            moving = states_in(caches)[len(caches) - len(slopes) :]
            for pair, slope in zip(moving, slopes, strict=True):
                onward = onward + (pair[0] * slope[0]).sum() + (pair[1] * slope[1]).sum()
            return own + onward, own

        (_, own), gradient = mx.value_and_grad(loss)(parameters)
        return own, gradient

    return {"rows": rows, "read": read, "open": open}


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
