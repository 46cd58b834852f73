"""What this machine offers for training, and what to do where it could do better."""

import os
import platform
import sys
import time
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from mlx_adapters import __version__, device
from mlx_adapters.cpu import blas, threads
from mlx_adapters.units import size

__all__ = ["Finding", "doctor", "gflops"]

# The reference BLAS of MLX's Linux wheels reaches 4, any optimized one more than 30 on a single core.
_SLOW_GFLOPS = 20.0
_LOW_MEMORY = 4e9  # SmolLM2-135M trains in 2 to 3 GB
_PACKAGES = ("mlx", "mlx-lm", "numpy")
# (distribution, module, what it is for, how to get it)
_OPTIONAL = (
    ("torch", "torch", "--verify", "pip install torch==2.13.0 transformers peft"),
    ("transformers", "transformers", "--verify", "pip install torch==2.13.0 transformers peft"),
    ("peft", "peft", "export --verify", "pip install torch==2.13.0 transformers peft"),
)


@dataclass(frozen=True)
class Finding:
    """One fact. `ok` is False where training would suffer; `remedy` says what to do about it."""

    name: str
    value: str
    ok: bool = True
    remedy: str | None = None


def doctor() -> list[Finding]:
    """Look at device, BLAS and its speed, memory, and packages. Works without a usable MLX too."""
    found = [Finding("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"), _python()]
    found += _compute()
    found.append(_memory())
    found.append(Finding("mlx-adapters", __version__))
    found += [_package(name) for name in _PACKAGES]
    found += [_optional(*row) for row in _OPTIONAL]
    return [*found, _cache(), _hub()]


def gflops(size: int = 1024, seconds: float = 0.3) -> float:
    """Speed of a float32 matrix product on MLX's default device, in 1e9 operations a second."""
    import mlx.core as mx

    a = mx.random.normal((size, size))
    mx.eval(a, a @ a)  # the first product allocates and warms up
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds or count == 0:
        mx.eval(a @ a)
        count += 1
    return 2 * size**3 * count / spent / 1e9


def _python() -> Finding:
    version = platform.python_version()
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("Python", version, False, "use Python 3.11, 3.12 or 3.13")
    return Finding("Python", version)


def _forced() -> list[Finding]:
    """OpenBLAS takes its kernels from this variable instead of the processor: with the wrong ones a training
    step was a fifth slower."""
    kind = os.environ.get("OPENBLAS_CORETYPE")
    if not kind or blas.blas().name != "OpenBLAS":
        return []
    remedy = (
        "unset OPENBLAS_CORETYPE, unless it is set for a reason: OpenBLAS picks kernels for this processor"
    )
    return [Finding("BLAS kernels", f"{kind}, forced by OPENBLAS_CORETYPE", False, remedy)]


def _threads() -> list[Finding]:
    """How many threads a run would compute with now, and why."""
    if threads.most() == 0:
        return []
    if threads.fixed() or threads.most() == 1:
        why = "fixed by the environment" if threads.fixed() else "this machine has one core"
        return [Finding("BLAS threads", f"{threads.count()}, {why}")]
    speeds = threads.speeds()
    used = threads.use(threads.fewest(speeds))
    found = f"{used} of {threads.most()}"
    if used == threads.most():
        return [Finding("BLAS threads", f"{found}: {speeds[used] / speeds[1]:.1f} times as fast as one")]
    share = speeds[threads.most()] / speeds[used]
    busy = f"{found}: other programs keep the cores busy, all would have {share:.0%} of the speed"
    return [Finding("BLAS threads", busy, True, "close what computes beside this: a run takes what is free")]


def _compute() -> list[Finding]:
    try:
        import mlx.core as mx

        found = _threads()
        unit = "CPU" if device.on_cpu() else str(mx.device_info().get("device_name", "GPU"))
        speed = gflops()
    except Exception as error:  # a missing library, or a device that cannot compute
        reason = " ".join(str(error).split())
        return [Finding("device", f"MLX does not work ({reason})", False, 'pip install "mlx-adapters[cpu]"')]
    if not device.on_cpu():
        return [Finding("device", unit), Finding("speed", f"{speed:.0f} GFLOP/s in float32")]
    used = blas.blas()
    where = f", {used.path}" if used.path else ""
    library = Finding("BLAS", f"{used.name} ({used.reason}{where})", used.remedy is None, used.remedy)
    slow = speed < _SLOW_GFLOPS
    remedy = used.remedy or "is the machine busy? Try again" if slow else None
    return [
        Finding("device", unit),
        library,
        *_forced(),
        *found,
        Finding("speed", f"{speed:.0f} GFLOP/s in float32", not slow, remedy),
    ]


def _memory() -> Finding:
    free = device.free_memory()
    value = f"{device.total_memory() / 1e9:.1f} GB, {free / 1e9:.1f} GB available"
    if free < _LOW_MEMORY:
        return Finding("memory", value, False, "close programs, or train with a smaller --batch-size")
    return Finding("memory", value)


def _cache() -> Finding:
    """What downloads and compiled kernels take."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = [Path(HF_HUB_CACHE), blas.cache()]
    sizes = [sum(file.lstat().st_size for file in place.rglob("*") if file.is_file()) for place in places]
    found = [f"{size(took)} in {place}" for took, place in zip(sizes, places, strict=True)]
    return Finding("caches", "; ".join(found))


def _hub() -> Finding:
    """Whether a token is stored, which private and gated models need; nothing is sent."""
    from huggingface_hub import get_token

    if get_token() is None:
        return Finding("hub", "not logged in", True, "for private and gated models: hf auth login")
    return Finding("hub", "logged in: a token is stored")


def _package(name: str) -> Finding:
    try:
        return Finding(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "not installed", False, 'pip install "mlx-adapters[cpu]"')


def _optional(name: str, module: str, purpose: str, remedy: str) -> Finding:
    if util.find_spec(module) is None:
        return Finding(name, f"not installed; {purpose} needs it", True, remedy)
    try:
        return Finding(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "installed, version unknown")
