"""The fast BLAS: found, built once, checked before use, and never a reason to fail.

Each case is a fresh process: what `import mlx_adapters` does can be observed only before mlx is loaded.
"""

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from fresh_process import linux, openblas, run

from mlx_adapters import device
from mlx_adapters.cpu import cores

_REPORT = """
import json, sys
import mlx_adapters
from mlx_adapters.cpu.blas import blas as loaded
blas = loaded()
print(json.dumps([blas.name, blas.path, blas.reason, blas.remedy, "mlx.core" in sys.modules]))
"""


@openblas
def test_first_start_builds_a_copy_and_the_next_uses_it(tmp_path: Path) -> None:
    name, path, _, remedy, _ = run(_REPORT, XDG_CACHE_HOME=str(tmp_path))
    assert (name, remedy) == ("OpenBLAS", None)
    copy = Path(path)
    assert list((tmp_path / "mlx-adapters").iterdir()) == [copy], "no half-written file may stay"
    built = copy.stat().st_mtime_ns
    assert run(_REPORT, XDG_CACHE_HOME=str(tmp_path))[1] == path
    assert copy.stat().st_mtime_ns == built


@openblas
def test_a_damaged_copy_is_built_again(tmp_path: Path) -> None:
    copy = Path(run(_REPORT, XDG_CACHE_HOME=str(tmp_path))[1])
    copy.unlink()
    copy.write_bytes(b"no library")
    name, path, _, remedy, _ = run(_REPORT, XDG_CACHE_HOME=str(tmp_path))
    assert (name, path, remedy) == ("OpenBLAS", str(copy), None)
    assert copy.stat().st_size > 1_000_000


@openblas
def test_many_processes_may_start_at_once(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", _REPORT], env=environment, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    assert [json.loads(process.communicate(timeout=120)[0])[0] for process in started] == ["OpenBLAS"] * 4
    assert len(list((tmp_path / "mlx-adapters").iterdir())) == 1


@openblas
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    name, path, reason, remedy, _ = run(_REPORT, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert (name, path) == ("reference", None)
    assert str(tmp_path) in reason
    assert "XDG_CACHE_HOME" in remedy


@openblas
def test_a_relative_cache_is_ignored(tmp_path: Path) -> None:
    """The XDG specification says so; a copy under the current folder would litter it."""
    assert Path(run(_REPORT, XDG_CACHE_HOME="here", HOME=str(tmp_path))[1]).is_relative_to(tmp_path)


@linux
def test_off_is_respected() -> None:
    name, path, reason, remedy, _ = run(_REPORT, MLX_ADAPTERS_BLAS="off")
    assert (name, path, reason, remedy) == ("reference", None, "MLX_ADAPTERS_BLAS=off", None)


@linux
def test_a_wished_library_that_does_not_load_is_named(tmp_path: Path) -> None:
    wish = str(tmp_path / "lib.so")
    name, _, reason, remedy, _ = run(_REPORT, MLX_ADAPTERS_BLAS=wish)
    assert name == "reference"
    assert wish in reason
    assert "MLX_ADAPTERS_BLAS" in remedy


@openblas
def test_a_library_without_the_product_is_refused() -> None:
    """The wheel's own file has prefixed names only: it loads, and would change nothing."""
    spec = util.find_spec("scipy_openblas32")
    assert spec is not None
    assert spec.origin is not None
    wish = next((Path(spec.origin).parent / "lib").glob("libscipy_openblas*.so"))
    name, path, reason, _, _ = run(_REPORT, MLX_ADAPTERS_BLAS=str(wish))
    assert (name, path) == ("reference", None)
    assert "cblas_sgemm" in reason


@linux
def test_mlx_imported_first_is_said() -> None:
    name, _, reason, remedy, _ = run("import mlx.core" + _REPORT)
    assert (name, reason) == ("reference", "mlx was imported before mlx_adapters")
    assert "before" in remedy


@linux
def test_importing_the_package_does_not_import_mlx() -> None:
    assert run(_REPORT)[4] is False


@openblas
@pytest.mark.parametrize("first", ["mlx_adapters", "mlx.core"])
def test_the_loader_binds_the_products_of_mlx_to_the_fast_library(first: str, tmp_path: Path) -> None:
    """Asked of the dynamic linker itself: times would depend on how busy the machine is."""
    code = f"import {first}\nimport mlx.core as mx\na = mx.ones((64, 64))\nprint((a @ a).sum().item())"
    log = {"LD_DEBUG": "bindings", "LD_DEBUG_OUTPUT": str(tmp_path / "log")}
    assert run(code, **log) == 64**3
    lines = [line for file in tmp_path.glob("log*") for line in file.read_text(errors="replace").splitlines()]
    if not lines:
        pytest.skip("this C library has no LD_DEBUG")
    bound = [line for line in lines if "`cblas_sgemm'" in line and "libmlx" in line.split(" to ")[0]]
    assert bound
    assert all(("/openblas-" in line.split(" to ")[1]) == (first == "mlx_adapters") for line in bound)


@linux
def test_products_of_all_layouts_are_right() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2, 70, 70)).astype(np.float32) for _ in range(2))
    for left in (a, a.swapaxes(1, 2)):
        for right in (b, b.swapaxes(1, 2)):
            ours = np.array(mx.array(left) @ mx.array(right))
            np.testing.assert_allclose(ours, left.astype(np.float64) @ right, atol=5e-5)


def test_metal_keeps_types_and_cpu_computes_in_float32() -> None:
    assert device.compute_dtype() == (mx.float32 if device.on_cpu() else None)


def test_peak_memory_sees_an_allocation() -> None:
    before = device.peak_memory()
    held = mx.zeros((device.peak_memory() // 4 + 64_000_000,), mx.float32) + 1
    mx.eval(held)
    assert device.peak_memory() > before


@openblas
def test_start_costs_little() -> None:
    """Loading the built copy: 30 ms are wanted, the bound leaves room for a busy machine."""
    code = "import json, time; s = time.perf_counter(); import mlx_adapters; print(time.perf_counter() - s)"
    run(code)
    assert min(run(code) for _ in range(3)) < 0.3


def test_metal_gets_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine here has Metal: what would be called, with what it would answer."""
    import mlx.core as mx

    limits: dict[str, int] = {}
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12_000})
    monkeypatch.setattr(mx, "set_wired_limit", lambda size: limits.update(wired=size))
    monkeypatch.setattr(mx, "set_cache_limit", lambda size: limits.update(cache=size))
    device.prepare_memory()
    assert limits == {"wired": 12_000, "cache": 3_000}


def test_free_memory_knows_the_machine_its_processes_the_gpu_and_the_container(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import psutil

    assert 0 < device.free_memory() <= psutil.virtual_memory().total

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=9_000))
    monkeypatch.setattr(device, "_container_memory", lambda: sys.maxsize)
    monkeypatch.delenv("MLX_ADAPTERS_PROCESSES", raising=False)
    assert device.free_memory() == device.free_memory(shared=True) == 9_000
    for name, value in cores.share(3).items():
        monkeypatch.setenv(name, value)
    assert (device.free_memory(), device.free_memory(shared=True)) == (9_000, 3_000)
    for wrong in ("", "0", "three"):
        monkeypatch.setenv("MLX_ADAPTERS_PROCESSES", wrong)
        assert device.free_memory(shared=True) == 9_000

    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12_000})
    monkeypatch.setattr(mx, "get_active_memory", lambda: 4_000)
    assert device.free_memory() == 8_000
    monkeypatch.setattr(mx, "get_active_memory", lambda: 14_000)
    assert device.free_memory() == 0


def test_a_containers_limit_counts_but_not_the_files_it_has_read(tmp_path: Path) -> None:
    assert device._container_memory(tmp_path) == sys.maxsize
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 200\nactive_file 100\n")
    for limit, free in (("1000", 500), ("600", 100), ("300", 0), ("max", sys.maxsize)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert device._container_memory(tmp_path) == free
