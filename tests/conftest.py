"""What every test starts from: an environment of the tests' own, and mlx_adapters imported before mlx."""

import os
from pathlib import Path
from runpy import run_path

import pytest

# No test may depend on what this machine's user has set: all but these is taken away, before it is read.
_KEPT = ("HOME", "LOGNAME", "PATH", "SHELL", "TEMP", "TMP", "TMPDIR", "USER", "VIRTUAL_ENV")
_KEPT += ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")  # pip builds a wheel
_KEPT_TOO = ("COV", "DYLD_", "LD_", "PIP_", "PYTEST", "SSL_", "MLX_ADAPTERS_HUB_", "MLX_ADAPTERS_T451_")
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
    from mlx_adapters.models.demo import demo_model

    try:
        demo_model()
    except ConfigError as error:
        pytest.skip(str(error))
    benchmark = run_path(str(Path(__file__).parents[1] / "examples" / "benchmarks" / "training.py"))
    folder: Path = benchmark["embedded"](tmp_path_factory.mktemp("smollm2"))
    return folder
