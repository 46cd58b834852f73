"""How the processes of a machine share its cores and memory."""

import os

from mlx_adapters.device import SHARING

__all__ = ["count", "limited", "share", "shared_threads"]

_THREADS = "OPENBLAS_NUM_THREADS"


_SHARED_THREADS = "MLX_ADAPTERS_THREADS"  # the same number, where the user has not chosen it


def count() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(processes: int) -> dict[str, str]:
    """Environment that gives each of so many processes its share of this machine's cores and free memory."""
    own = str(max(1, count() // processes))
    limits = {_THREADS: own, "VECLIB_MAXIMUM_THREADS": own, SHARING: str(processes)}
    return limits if limited() else limits | {_SHARED_THREADS: own}


def limited() -> bool:
    """Whether the environment says how many cores to use: `share` did, or the user."""
    return _THREADS in os.environ


def shared_threads() -> bool:
    """Whether `share`, and not the user, limits the threads of this process."""
    return limited() and os.environ.get(_SHARED_THREADS) == os.environ[_THREADS]
