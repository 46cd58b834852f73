"""A fast BLAS on Linux, loaded before MLX.

MLX's Linux wheels link the reference BLAS (a few GFLOP/s). A library that exports `cblas_sgemm`, loaded with
RTLD_GLOBAL before `mlx.core`, takes its place. PyPI's `scipy-openblas32` has a fast one whose names carry a
`scipy_` prefix; `patchelf` writes a copy with the plain names into the user's cache, once. No failure on the
way is an error: MLX works without, and `mlx-adapters doctor` says what happened.

Only the three matrix products that MLX calls are renamed: a wider set of global names could be picked up by
other libraries in the process (torch, say).
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from mlx_adapters import device
from mlx_adapters.device import SHARING

__all__ = ["Blas", "blas", "cache", "library", "load_fast_blas", "warn_if_slow"]

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
    if _status.remedy is None or _warned or SHARING in os.environ or not device.on_cpu():
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
    return cache() / f"openblas-{facts.st_size:x}-{facts.st_mtime_ns:x}.so"


def cache() -> Path:
    if chosen := os.environ.get("MLX_ADAPTERS_CACHE"):
        return Path(chosen).expanduser()
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
