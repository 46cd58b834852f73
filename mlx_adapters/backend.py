"""The device below MLX: a fast BLAS on Linux, compute types, quantized layers on CPU, memory.

MLX's Linux wheels link the reference BLAS (a few GFLOP/s). A library that exports `cblas_sgemm`, loaded with
RTLD_GLOBAL before `mlx.core`, takes its place. PyPI's `scipy-openblas32` has a fast one whose names carry a
`scipy_` prefix; `patchelf` writes a copy with the plain names into the user's cache, once. Whatever fails on
the way is no error: MLX works without, and `mlx-adapters doctor` says what happened.

Only the three matrix products that MLX calls are renamed: a wider set of global names could be picked up by
other libraries in the process (torch, say).
"""

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import util
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

__all__ = [
    "Blas",
    "blas",
    "compute_dtype",
    "cores",
    "free_memory",
    "library",
    "limited",
    "load_fast_blas",
    "on_cpu",
    "own_kernels",
    "peak_memory",
    "prepare_memory",
    "rounding",
    "share",
    "shared_threads",
    "speed_up",
    "total_memory",
    "warn_if_slow",
]

_SHARING = "MLX_ADAPTERS_PROCESSES"  # how many share this machine
_THREADS = "OPENBLAS_NUM_THREADS"
_SHARED_THREADS = "MLX_ADAPTERS_THREADS"  # the same number, where it is no user's choice
_NAMES = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
_INSTALL = 'pip install "mlx-adapters[cpu]"'


@dataclass(frozen=True)
class Blas:
    """Which BLAS serves MLX on this CPU, and why; `remedy` is None where there is nothing to improve."""

    name: str
    path: str | None
    reason: str
    remedy: str | None


_status = Blas("system", None, "not looked at yet", None)
_library: ctypes.CDLL | None = None
_warned = False


def blas() -> Blas:
    """The outcome of `load_fast_blas`."""
    return _status


def warn_if_slow() -> None:
    """Say on stderr, once, that MLX computes with its slow BLAS, where something can be done about it.

    Processes that share this machine leave it to the one that started them.
    """
    global _warned
    if _status.remedy is None or _warned or _SHARING in os.environ or not on_cpu():
        return
    _warned = True
    print(
        f"mlx-adapters: MLX computes with its reference BLAS, many times slower ({_status.reason}): "
        f"{_status.remedy}",
        file=sys.stderr,
    )


def library() -> ctypes.CDLL | None:
    """What `load_fast_blas` loaded, for its further functions; None where MLX's own BLAS serves."""
    return _library


def load_fast_blas() -> None:
    """Load a fast BLAS before MLX, on Linux. Never raises; `blas()` tells the outcome.

    `MLX_ADAPTERS_BLAS=off` skips it; `MLX_ADAPTERS_BLAS=/path/lib.so` names a library to use instead.
    """
    global _status
    wish = os.environ.get("MLX_ADAPTERS_BLAS", "")
    if sys.platform == "darwin":
        _status = Blas("Accelerate", None, "macOS has it built in", None)
    elif _status.path is not None:
        return
    elif sys.platform != "linux" or wish == "off":
        _status = Blas("reference", None, f"MLX_ADAPTERS_BLAS={wish}" if wish else sys.platform, None)
    elif "mlx.core" in sys.modules:
        remedy = "import mlx_adapters before mlx or mlx_lm"
        _status = Blas("reference", None, "mlx was imported before mlx_adapters", remedy)
    else:
        try:
            _status = _load(wish)
        except Exception as error:  # a slow BLAS is better than no program
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            _status = Blas("reference", None, reason, _remedy(wish, error))


def _load(wish: str) -> Blas:
    global _library
    if wish:
        library = ctypes.CDLL(wish, mode=ctypes.RTLD_GLOBAL)
        _check(library)
        _library = library
        return Blas("custom", wish, "MLX_ADAPTERS_BLAS", None)
    spec = util.find_spec("scipy_openblas32")
    if spec is None or spec.origin is None:
        return Blas("reference", None, "scipy-openblas32 is not installed", _INSTALL)
    source = next((Path(spec.origin).parent / "lib").glob("libscipy_openblas*.so"))
    copy = _cached(source)
    # A copy that does not load was damaged after it was written: build it again.
    fresh = not copy.exists()
    if fresh:
        _rename_symbols(source, copy)
    try:
        library = ctypes.CDLL(str(copy), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        if fresh:
            raise
        _rename_symbols(source, copy)
        library = ctypes.CDLL(str(copy), mode=ctypes.RTLD_GLOBAL)
    _check(library)
    _library = library
    return Blas("OpenBLAS", str(copy), "scipy-openblas32", None)


def _remedy(wish: str, error: Exception) -> str:
    if wish:
        return "correct MLX_ADAPTERS_BLAS or unset it"
    if isinstance(error, OSError) and error.filename is not None:
        return "set XDG_CACHE_HOME to a folder that can be written"
    return _INSTALL


def _cached(source: Path) -> Path:
    # Size and time of the installed file stand for its content: hashing 25 MB at every start would cost more
    # than loading it.
    facts = source.stat()
    return _cache() / f"openblas-{facts.st_size:x}-{facts.st_mtime_ns:x}.so"


def _cache() -> Path:
    wished = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = wished if wished.is_absolute() else Path.home() / ".cache"  # the XDG specification's rule
    return cache / "mlx-adapters"


def _rename_symbols(source: Path, copy: Path) -> None:
    beside = Path(sys.executable).with_name("patchelf")
    tool = str(beside) if beside.exists() else shutil.which("patchelf")
    if tool is None:
        raise FileNotFoundError("patchelf is not installed")
    copy.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=copy.parent) as folder:
        names, output = Path(folder) / "names", Path(folder) / "openblas.so"
        names.write_text("".join(f"scipy_{name} {name}\n" for name in _NAMES))
        command = [tool, "--rename-dynamic-symbols", str(names), "--output", str(output), str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        output.replace(copy)


def _check(library: Any) -> None:
    """One small product: a library that loads but computes wrong must not be used."""
    row_major, no_transpose, n = 101, 111, 3
    matrix = ctypes.c_float * (n * n)
    a, b, c = matrix(*range(9)), matrix(*range(1, 10)), matrix()
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    library.cblas_sgemm(
        row_major, no_transpose, no_transpose, n, n, n, one, a, n, b, n, zero, c, n
    )  # fmt: skip
    expected = [sum((3 * i + k) * (3 * k + j + 1) for k in range(n)) for i in range(n) for j in range(n)]
    if list(c) != expected:
        raise ArithmeticError("its matrix product is wrong")


def on_cpu() -> bool:
    """Whether MLX computes on the CPU here."""
    import mlx.core as mx

    return bool(mx.default_device() == mx.cpu)


def compute_dtype() -> "mx.Dtype | None":
    """float32 on CPU, where half precision is not accelerated; None on Metal: keep the checkpoint's type."""
    import mlx.core as mx

    return mx.float32 if on_cpu() else None


def rounding(dtype: "mx.Dtype") -> float:
    """How far logits may be apart, of the largest, when the same is computed in another order."""
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


_kernels: int | None = None  # the open folder of `own_kernels`: locked until this process ends


def own_kernels() -> None:
    """Give this process a folder of its own for what `mx.compile` makes on a CPU, kept for later processes.

    MLX writes there without locks: two processes at once would load each other's half-written libraries, and
    one that is killed leaves such a library for all who come later. Never raises.
    """
    global _kernels
    if _kernels is not None or not on_cpu():
        return
    try:
        for number in count():
            folder = _cache() / f"kernels-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            _kernels = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(_kernels, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another process's, as long as it lives
                os.close(_kernels)
                continue
            break
        for library in folder.rglob("*.so"):
            if not _whole(library):
                library.unlink()
        tempfile.gettempdir()  # Python's own temporary files stay where they were
        os.environ["TMPDIR"] = str(folder)
    except (OSError, RuntimeError):
        pass  # no home, no place to write, or no locks: MLX's own folder then


def _whole(library: Path) -> bool:
    """Whether an ELF file is there to its end: linkers write its header last."""
    if sys.platform != "linux":
        return True
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    (table,), (size, entries) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return bool(library.stat().st_size >= table + size * entries)


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


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(processes: int) -> dict[str, str]:
    """Environment that gives each of so many processes its share of this machine's cores and free memory."""
    own = str(max(1, cores() // processes))
    given = {_THREADS: own, "VECLIB_MAXIMUM_THREADS": own, _SHARING: str(processes)}
    return given if limited() else given | {_SHARED_THREADS: own}


def limited() -> bool:
    """Whether the environment says how many cores to use: `share` did, or the user."""
    return _THREADS in os.environ


def shared_threads() -> bool:
    """Whether `share`, and not the user, limits the threads of this process."""
    return limited() and os.environ.get(_SHARED_THREADS) == os.environ[_THREADS]


def total_memory() -> int:
    """Bytes of this machine (on Metal: what the GPU may use)."""
    if not on_cpu():
        import mlx.core as mx

        info = mx.device_info()
        return int(info.get("max_recommended_working_set_size") or info.get("memory_size") or 0)
    import psutil

    return int(psutil.virtual_memory().total)


def free_memory(*, shared: bool = False) -> int:
    """Bytes that can be used without swapping, on Metal by the GPU; with `shared`, this process's part."""
    import psutil

    free = min(int(psutil.virtual_memory().available), _container_memory())
    if not on_cpu():
        import mlx.core as mx

        free = min(free, max(0, total_memory() - mx.get_active_memory()))
    processes = os.environ.get(_SHARING, "")
    return free // max(1, int(processes)) if shared and processes.isdecimal() else free


def _container_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a container may still use (cgroup v2); without one, or without a limit, no limit."""
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(facts["inactive_file"]))  # files' pages that are given up on demand
    except (OSError, ValueError, KeyError):  # "max" is no number
        return sys.maxsize


def speed_up(model: "nn.Module") -> None:
    """On CPU, let quantized layers with many rows compute as dequantize + float GEMM, and SwiGLU and
    attention take a faster exponential.

    MLX's quantized product does not use BLAS: it is up to fifty times slower there. Metal keeps the native
    kernels. Arrays, names and `isinstance(layer, nn.QuantizedLinear)` stay as they are.
    """
    if not on_cpu():
        return
    import mlx.nn as nn

    from mlx_adapters import exponential, quantized

    own_kernels()

    exponential.rebind(model)
    for module in model.modules():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = quantized.QuantizedLinear
        elif type(module) is nn.QuantizedEmbedding:
            module.__class__ = quantized.QuantizedEmbedding
