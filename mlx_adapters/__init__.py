"""mlx-adapters: adapters for language models on Apple MLX, exchanged with PyTorch.

    import mlx_adapters as ma

    model = ma.load("Qwen/Qwen2.5-0.5B-Instruct", bits=4)
    result = ma.train(model, "desk.jsonl", ma.LoRA(rank=16), output="desk", epochs=3)
    print(ma.generate(model, "How do I change my password?", adapter="desk"))
    print(ma.evaluate(model, "test.jsonl", adapter="desk").accuracy)
    ma.export("desk", "for-pytorch", base="Qwen/Qwen2.5-0.5B-Instruct", verify=True)

Names are loaded when they are first used, so importing the package is quick and does not import MLX. It does
one thing beyond defining names: on Linux it loads a fast BLAS, because that must happen before `mlx.core` is
loaded (see `mlx_adapters.cpu.blas`).
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from mlx_adapters.cpu import blas

__version__ = "0.1.0"

_FROM = {
    "api": (
        *("attach", "combine", "compare", "convert", "detach", "evaluate", "export", "fuse", "generate"),
        *("import_adapter", "load", "load_adapter", "plan", "save", "study", "train"),
    ),
    "errors": (
        *("AdapterError", "AdaptersError", "CheckpointError", "ConfigError", "DataError", "OutputError"),
        *("TrainingError", "UnsupportedError"),
    ),
    "models.load": ("LanguageModel",),
}
_MODULES = {name: module for module, names in _FROM.items() for name in names}

__all__ = sorted([*_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mlx_adapters' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"mlx_adapters.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__


class _FrontDoor(ModuleType):
    """Some functions have the name of a package (`train`, `convert`): importing a module of that package must
    not put the package in the function's place, as it otherwise would."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _FrontDoor
blas.load_fast_blas()
