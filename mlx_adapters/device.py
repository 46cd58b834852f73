"""The device that MLX computes on: its compute types and its memory."""

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = [
    "SHARING",
    "compute_dtype",
    "free_memory",
    "on_cpu",
    "peak_memory",
    "prepare_memory",
    "rounding",
    "sharing",
    "total_memory",
    "tree_bytes",
]

SHARING = "MLX_ADAPTERS_PROCESSES"  # how many share this machine


def on_cpu() -> bool:
    """Whether MLX computes on the CPU here."""
    import mlx.core as mx

    return bool(mx.default_device() == mx.cpu)


def compute_dtype() -> "mx.Dtype | None":
    """float32 on CPU, where half precision is not accelerated; None on Metal: keep the checkpoint's type."""
    import mlx.core as mx

    return mx.float32 if on_cpu() else None


def rounding(dtype: "mx.Dtype") -> float:
    """Relative tolerance for logits of `dtype` that are computed in a different order of operations."""
    import mlx.core as mx

    return 1e-4 if dtype == mx.float32 else 3e-2


def peak_memory() -> int:
    """Bytes: the process's peak resident size on CPU, MLX's peak allocation on Metal."""
    if on_cpu():
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    import mlx.core as mx

    return int(mx.get_peak_memory())


def prepare_memory() -> None:
    """Settings of the allocators for many steps of the same work.

    On Metal the working set is kept resident, and the cache of freed buffers is bounded: with batches of many
    shapes it climbs unseen otherwise. On Linux the C library keeps what MLX frees: by default it gives large
    blocks back to the system at once, and a fifth of a training step went into page faults.
    """
    if not on_cpu():
        import mlx.core as mx

        limit = int(mx.device_info().get("max_recommended_working_set_size") or 0)
        if limit:
            mx.set_wired_limit(limit)
            mx.set_cache_limit(limit // 4)
        return
    if sys.platform != "linux":
        return
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 32 << 20)  # the largest that glibc takes
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):  # musl has no such options
        pass


def total_memory() -> int:
    """Bytes of this machine (on Metal: what the GPU may use)."""
    if not on_cpu():
        import mlx.core as mx

        info = mx.device_info()
        return int(info.get("max_recommended_working_set_size") or info.get("memory_size") or 0)
    import psutil

    return int(psutil.virtual_memory().total)


def free_memory(*, shared: bool = False) -> int:
    """Bytes that can be used without swapping, on Metal by the GPU; with `shared`, this process's share."""
    import psutil

    free = min(int(psutil.virtual_memory().available), _container_memory())
    if not on_cpu():
        import mlx.core as mx

        free = min(free, max(0, total_memory() - mx.get_active_memory()))
    return free // sharing() if shared else free


def sharing() -> int:
    """How many processes, of those that this library started together, share this machine."""
    processes = os.environ.get(SHARING, "")
    return max(1, int(processes)) if processes.isdecimal() else 1


def _container_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a container may still use (cgroup v2); without one, or without a limit, no limit."""
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(facts["inactive_file"]))  # files' pages that are given up on demand
    except (OSError, ValueError, KeyError):  # "max" is not a number
        return sys.maxsize


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays in a tree, such as a model's parameters."""
    from mlx.utils import tree_flatten

    return sum(array.nbytes for _, array in tree_flatten(tree))
