"""A compiled step is the step that is not compiled, whatever the method and the options; the compiler's
folder belongs to one process, and Ctrl-C does not reach the compiler."""

import gc
import os
import struct
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import CASES, config, examples, flat, llama_with, tiny

from mlx_adapters import device
from mlx_adapters.errors import ConfigError, TrainingError
from mlx_adapters.train import compile as compilation
from mlx_adapters.train.compile import compiling
from mlx_adapters.train.loop import Run

FAST = ("lora", "dora", "prefix", "seq_bn")  # each compiles a dozen kernels of its own, a second each


def trained(model: Any, **fields: Any) -> tuple[list[float], dict[str, np.ndarray]]:
    losses = [step.loss for step in Run(model, examples(), config=config(lr=1e-3, **fields))]
    return losses, flat(model)


@pytest.mark.parametrize("case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_every_method(case: str) -> None:
    plain, without = trained(llama_with(case), compile="off", steps=3)
    compiled, arrays = trained(llama_with(case), compile="on", steps=3)
    np.testing.assert_allclose(compiled, plain, rtol=1e-5)
    for name, array in without.items():
        np.testing.assert_allclose(arrays[name], array, atol=1e-4 * np.abs(array).max())


@pytest.mark.parametrize(
    "fields",
    [
        {"packing": True, "max_length": 32},
        {"gradient_checkpointing": True},
        {"neftune": 5.0},
        {"accumulation": 2},
    ],
)
def test_every_option(fields: dict[str, Any]) -> None:
    """Shapes repeat and so does the traced function: what changes from step to step must be an input."""
    plain, without = trained(tiny(dropout=0.3), compile="off", steps=8, **fields)
    compiled, arrays = trained(tiny(dropout=0.3), compile="on", steps=8, **fields)
    np.testing.assert_allclose(compiled, plain, rtol=1e-5)
    for name, array in without.items():
        np.testing.assert_allclose(arrays[name], array, atol=1e-4 * np.abs(array).max())


def test_traces_are_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[compilation.Compiled[Any, Any]] = []

    class Noted(compilation.Compiled[Any, Any]):
        def __init__(self, function: Any) -> None:
            super().__init__(function)
            made.append(self)

    monkeypatch.setattr(compilation, "_SHAPES", 1)
    monkeypatch.setattr(compilation, "Compiled", Noted)
    plain, _ = trained(tiny(), compile="off", batch_size=2, steps=8)
    model = tiny()
    run = Run(model, examples(), config=config(lr=1e-3, compile="on", batch_size=2, steps=8))
    assert [step.loss for step in run] == pytest.approx(plain, rel=1e-5)
    assert [len(compiled.shapes) for compiled in made] == [1]


def test_who_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Run(tiny(), examples(), config=config()).compiles
    assert Run(tiny(), examples(), config=config(compile="on")).compiles
    on_a_gpu, not_there = (Run(tiny(), examples(), config=config(compile=c)) for c in ("auto", "off"))
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    assert on_a_gpu.compiles
    assert not not_there.compiles
    with pytest.raises(ConfigError, match=r"compile 'yes'.*auto, off, on"):
        config(compile="yes")


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_a_run_that_is_done_frees_its_model(compiled: str) -> None:
    """No circle of references: a study holds one model at a time, and `plan` measures what is in use."""
    gc.collect()
    gc.disable()
    try:
        run = Run(tiny(), examples(), config=config(compile=compiled, steps=2))
        list(run)
        model = weakref.ref(run.model)
        del run
        assert model() is None
    finally:
        gc.enable()


def test_each_process_has_its_own_folder(tmp_path: Path) -> None:
    """A folder is free again when its process ends, and a library cut short is not there any more;
    a whole one serves the next folder too."""
    code = (
        "from mlx_adapters.cpu import kernels; import os; kernels.own_kernels(); print(os.environ['TMPDIR'])"
    )
    command = [sys.executable, "-c", code + "; input()"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    running = [start(), start()]
    folders = [process.stdout.readline().strip() for process in running]  # type: ignore[union-attr]
    assert len(set(folders)) == 2
    for process in running:
        process.communicate("\n")

    libraries = Path(min(folders)) / "mlx"
    libraries.mkdir()
    header = b"\x7fELF" + bytes(36) + struct.pack("<Q", 64) + bytes(10) + struct.pack("<HHH", 64, 1, 0)
    assert len(header) == 64  # it says that one section of 64 bytes is told from byte 64 on
    (libraries / "whole.so").write_bytes(header + bytes(64))
    (libraries / "cut.so").write_bytes(header + bytes(63))
    (libraries / "empty.so").touch()
    running = [start(), start()]
    # the second process takes over what the first has, once it is whole
    assert {process.stdout.readline().strip() for process in running} == set(folders)  # type: ignore[union-attr]
    for process in running:
        process.communicate("\n")
    if sys.platform == "linux":
        assert [file.name for file in libraries.iterdir()] == ["whole.so"]
        assert [file.name for file in (Path(max(folders)) / "mlx").iterdir()] == ["whole.so"]


def test_ctrl_c_does_not_reach_the_compiler() -> None:
    kills_itself = ["sh", "-c", "kill -INT $$; echo alive"]
    with compiling():
        assert subprocess.run(kills_itself, capture_output=True, check=False).stdout == b"alive\n"
    assert subprocess.run(kills_itself, capture_output=True, check=False).stdout == b""


def test_a_compiler_that_fails_is_told() -> None:
    with pytest.raises(TrainingError, match=r"could not be compiled. Train with --compile off"), compiling():
        raise RuntimeError("[Compile::eval_cpu] Failed to compile function f: no such header")
    with pytest.raises(RuntimeError, match="another"), compiling():
        raise RuntimeError("another")
