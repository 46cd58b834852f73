"""How many threads OpenBLAS computes with: as many as help at the moment.

Inside a product OpenBLAS's threads wait for each other without giving up their cores. Where another program
keeps one core busy, the system takes that core from a thread for milliseconds at a time, and the others wait
for it, in every product. Training SmolLM2-135M on two cores beside one busy program, two threads gave 11
tokens/s and one thread 90; on the idle machine they give 129 and 101. So a product is timed with all threads
and with fewer, and the fewest that come near the best are used.

The number of threads decides the last bits of a product: a resumed run starts with the number it had, and a
run only ever lowers it. OPENBLAS_NUM_THREADS, set by the user, is taken as it is: nothing is measured or
changed then. On macOS Accelerate decides by itself.
"""

import ctypes
import os
import time
from collections.abc import Callable
from functools import cache

from mlx_adapters.cpu import blas, cores

__all__ = ["count", "fewest", "fixed", "in_words", "keep_up", "most", "settle", "speeds", "use"]

_ROWS, _WIDTH = 64, 576  # a product of SmolLM2-135M: small ones suffer most
_SECONDS = 0.04  # of a measurement: beside a busy program ten milliseconds were sometimes all fast
_ENOUGH = 0.9  # of the best speed: a thread that adds less leaves its core to others
_EVERY = 20.0  # seconds between measurements during the work: they take half a percent of the time

_last = -_EVERY  # when it was measured, by `time.monotonic`


def fixed() -> bool:
    """Whether the user's environment names the number; what `cores.share` puts there is only the most."""
    names = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")
    return any(name in os.environ for name in names) and not cores.shared_threads()


@cache
def most() -> int:
    """How many OpenBLAS takes by itself; 0 where another library computes."""
    return count()


def count() -> int:
    """How many are in use; 0 where another library computes."""
    get = _function("get_num_threads")
    return int(get()) if get else 0


def use(threads: int) -> int:
    """Take so many, or as many as there are, and return the number. What the user fixed stays."""
    put = _function("set_num_threads")
    if put and not fixed():
        put(max(1, min(threads, most())))
    return count()


def settle() -> int:
    """Measure, take the fewest threads that come near the best speed, and return their number."""
    if most() > 1 and not fixed():
        use(fewest(speeds()))
    return count()


def keep_up(limit: int = 0) -> int:
    """Measure again if some time has passed: for loops to call before each step. Returns the number in use.

    With a `limit` that number is taken, and only lowered where two measurements agree: at one of them the
    machine may have been busy for a moment.
    """
    if limit:
        use(limit)
    if fixed() or (limit or most()) <= 1 or time.monotonic() - _last < _EVERY:
        return count()
    import mlx.core as mx

    mx.synchronize()  # what is still being computed would be measured too
    wanted = fewest(speeds(limit))
    if limit and wanted < limit:
        wanted = max(wanted, fewest(speeds(limit)))
    return use(wanted)


def in_words() -> str:
    """What the user may want to know where not all threads are in use; empty where all are."""
    if count() == most():
        return ""
    return (
        f"OpenBLAS computes with {count()} of {most()} threads: other programs keep the cores busy, and more "
        f"threads would be slower (OPENBLAS_NUM_THREADS={most()} insists)"
    )


def speeds(limit: int = 0) -> dict[int, float]:
    """{threads: products per second} for `limit` threads or all, for half as many, and so on down to one."""
    global _last
    before, threads, found = count(), limit or most(), {}
    product = _product()
    while threads:
        if use(threads) > 1:
            _rate(product)  # threads that wake up stand on one core until the system moves them apart
        found[threads] = _rate(product)
        threads //= 2
    use(before)
    _last = time.monotonic()
    return found


def fewest(found: dict[int, float]) -> int:
    """The smallest number of threads that comes near the best of these speeds."""
    best = max(found.values())
    return min(threads for threads, speed in found.items() if speed >= _ENOUGH * best)


def _rate(product: Callable[[], object]) -> float:
    done, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < _SECONDS or not done:
        product()
        done += 1
    return done / spent


def _product() -> Callable[[], object]:
    row_major, no_transpose = 101, 111
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    a, b, c = ((ctypes.c_float * (rows * _WIDTH))() for rows in (_ROWS, _WIDTH, _ROWS))
    multiply = blas.library().cblas_sgemm  # type: ignore[union-attr]
    shape = (_ROWS, _WIDTH, _WIDTH)
    return lambda: multiply(
        row_major, no_transpose, no_transpose, *shape, one, a, _WIDTH, b, _WIDTH, zero, c, _WIDTH
    )


def _function(name: str) -> Callable[..., int] | None:
    """A function of the loaded OpenBLAS, whose names carry a prefix in scipy's build."""
    library = blas.library()
    plain = getattr(library, f"openblas_{name}", None)
    return plain or getattr(library, f"scipy_openblas_{name}", None)
