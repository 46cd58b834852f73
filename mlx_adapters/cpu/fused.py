"""Element-wise functions in one pass over memory, also where gradients are being taken.

`mx.compile` leaves a function as it is where its arrays are those of a trace, and in training all are: SwiGLU
and attention took a pass for every operation, four times as long. MLX keeps what is traced by thread, so the
call is made in another one, which knows of no trace. That hides the operations from the trace: only what
stands in an `mx.custom_function` with a gradient of its own may be called so.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, wraps
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
        return _thread().submit(_within, mx.default_stream(mx.cpu), compiled, arrays).result()

    return call  # type: ignore[return-value]


def _within(stream: mx.Stream, compiled: Callable[..., Any], arrays: tuple[mx.array, ...]) -> Any:
    with mx.stream(stream):
        return compiled(*arrays)


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="fused")
