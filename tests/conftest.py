"""What every test starts from: an environment of the tests' own, and mlx_adapters imported before mlx."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from runpy import run_path

import pytest
from subsets import is_fast, is_parity, is_unit

# No test may depend on what this machine's user has set: all but these is taken away, before it is read.
_KEPT = ("HOME", "LOGNAME", "PATH", "SHELL", "TEMP", "TMP", "TMPDIR", "USER", "VIRTUAL_ENV")
_KEPT += ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")  # pip builds a wheel
_KEPT_TOO = (
    "COV",
    "DYLD_",
    "LD_",
    "PIP_",
    "PYTEST",
    "SSL_",
    "MLX_ADAPTERS_HUB_",
    "MLX_ADAPTERS_LLAMA_CPP",
    "MLX_ADAPTERS_T451_",
)
_OWN = Path(__file__).parents[1] / ".pytest_cache" / "user"
_SET = {
    "COLUMNS": "80",
    "HF_HUB_OFFLINE": "1",  # no test may depend on a network
    "LANG": "C.UTF-8",
    "LINES": "24",
    "NO_PROXY": "127.0.0.1,localhost",
    # one thread: the other core is another worker's, and the last bits of a product depend on their number
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # see mlx_adapters.cli.app.main
    "OPENBLAS_NUM_THREADS": "1",
    "TERM": "xterm-256color",
    "TOKENIZERS_PARALLELISM": "false",
    "XDG_CACHE_HOME": str(_OWN / "cache"),  # the hub's models and tokens too
    "XDG_CONFIG_HOME": str(_OWN / "config"),
}
for _name in list(os.environ):
    if _name not in _KEPT and not _name.startswith(_KEPT_TOO):
        del os.environ[_name]
os.environ.update(_SET)

import mlx_adapters  # noqa: E402, F401


@pytest.hookimpl(tryfirst=True)  # before pytest selects by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Set the marks `unit` and `parity`; a slow test has neither."""
    for item in items:
        if isinstance(item, pytest.Function) and not item.get_closest_marker("slow"):
            name = f"{item.cls.__name__}.{item.originalname}" if item.cls else item.originalname
            if is_parity(item.path, name):
                item.add_marker("parity")
            elif is_unit(item.path, name):
                item.add_marker("unit")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of the modules that have no unit tests some import torch: `-m unit` leaves them out."""
    left_out = collection_path.name.startswith("test_") and not is_fast(collection_path)
    return True if config.option.markexpr == "unit" and left_out else None


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "unit":  # transformers imports torch wherever it can: as in cli.app.main
        assert "torch" not in sys.modules
        sys.modules["torch"] = None  # type: ignore[assignment]


@pytest.fixture(scope="session", autouse=True)
def _unit_tests_import_no_torch(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.config.option.markexpr == "unit":
        assert sys.modules["torch"] is None


class Models(dict[str, Path]):
    """{architecture: its tiny model, converted}, each made when first asked for; in `torch` below
    it lies what transformers opens."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, arch: str) -> Path:
        from tiny import make_tiny

        from mlx_adapters.convert.checkpoint import convert
        from mlx_adapters.convert.to_transformers import write_transformers
        from mlx_adapters.models import load as model

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
    from mlx_adapters.errors import ConfigError
    from mlx_adapters.models.embedded import embedded_model

    try:
        embedded_model()
    except ConfigError as error:
        pytest.skip(str(error))
    benchmark = run_path(str(Path(__file__).parents[1] / "examples" / "benchmarks" / "training.py"))
    folder: Path = benchmark["embedded"](tmp_path_factory.mktemp("smollm2"))
    return folder
