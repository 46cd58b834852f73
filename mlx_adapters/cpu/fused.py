"""Element-wise functions in one pass over memory, also where gradients are being taken.

`mx.compile` leaves a function as it is where its arrays are those of a trace, and in training all are: SwiGLU
and attention took a pass for every operation, four times as long. MLX keeps what is traced by thread, so the
call is made in another one, which knows of no trace. That hides the operations from the trace: only what
stands in an `mx.custom_function` with a gradient of its own may be called so.
"""

import os
import threading
from collections.abc import Callable
from functools import cache, wraps
from queue import SimpleQueue
from typing import Any, TypeVar

import mlx.core as mx

from mlx_adapters import device

__all__ = ["fused"]

_SMALL = 1 << 13  # elements for which the way to another thread takes longer than it saves
_TINY = 1 << 10  # elements for which nothing is worth a compiler

Function = TypeVar("Function", bound=Callable[..., Any])


def fused(function: Function) -> Function:
    """`function` of arrays, compiled. On a CPU a trace does not see inside."""
    compiled = mx.compile(function)

    @wraps(function)
    def call(*arrays: mx.array) -> Any:
        if arrays[0].size < _TINY:
            return function(*arrays)
        if arrays[0].size < _SMALL or not device.on_cpu():
            return compiled(*arrays)
        return _elsewhere(_within, mx.default_stream(mx.cpu), compiled, arrays)

    return call  # type: ignore[return-value]


def _within(stream: mx.Stream, compiled: Callable[..., Any], arrays: tuple[mx.array, ...]) -> Any:
    with mx.stream(stream):
        return compiled(*arrays)


def _elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns or raises in the other thread."""
    reply: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
    _tasks().put((function, arguments, reply))
    value, error = reply.get()
    if error is not None:
        raise error
    return value


@cache
def _tasks() -> "SimpleQueue[Any]":
    """The tasks of the other thread. It never ends: a thread that ends drops what MLX compiled in it, for
    which it needs Python, and a program that ends just then is aborted."""
    tasks: SimpleQueue[Any] = SimpleQueue()

    def work() -> None:
        while True:
            function, arguments, reply = tasks.get()
            try:
                reply.put((function(*arguments), None))
            except BaseException as error:  # raised again where the call was made
                reply.put((None, error))
            del function, arguments, reply

    threading.Thread(target=work, name="fused", daemon=True).start()
    return tasks


os.register_at_fork(after_in_child=_tasks.cache_clear)  # a child has no other threads
