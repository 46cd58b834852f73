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
from typing import TYPE_CHECKING, Any

from mlx_adapters.cpu import blas

if TYPE_CHECKING:  # what type checkers and editors see; at run time `_FROM` says the same, lazily
    from mlx_adapters.adapter.attach import attach as attach
    from mlx_adapters.adapter.attach import detach as detach
    from mlx_adapters.adapter.folder import save as save
    from mlx_adapters.adapter.meta import AdapterMeta as AdapterMeta
    from mlx_adapters.api import Exported as Exported
    from mlx_adapters.api import combine as combine
    from mlx_adapters.api import convert as convert
    from mlx_adapters.api import export as export
    from mlx_adapters.api import fuse as fuse
    from mlx_adapters.api import import_adapter as import_adapter
    from mlx_adapters.api import load as load
    from mlx_adapters.api import load_adapter as load_adapter
    from mlx_adapters.data.preview import row_statistics as row_statistics
    from mlx_adapters.data.preview import show_rows as show_rows
    from mlx_adapters.errors import AdapterError as AdapterError
    from mlx_adapters.errors import AdaptersError as AdaptersError
    from mlx_adapters.errors import CheckpointError as CheckpointError
    from mlx_adapters.errors import ConfigError as ConfigError
    from mlx_adapters.errors import DataError as DataError
    from mlx_adapters.errors import OutputError as OutputError
    from mlx_adapters.errors import TrainingError as TrainingError
    from mlx_adapters.errors import UnsupportedError as UnsupportedError
    from mlx_adapters.evaluate.compare import Comparison as Comparison
    from mlx_adapters.evaluate.compare import compare as compare
    from mlx_adapters.evaluate.run import Evaluation as Evaluation
    from mlx_adapters.evaluate.run import evaluate as evaluate
    from mlx_adapters.generate.text import generate as generate
    from mlx_adapters.generate.text import stream as stream
    from mlx_adapters.methods import IA3 as IA3
    from mlx_adapters.methods import DoRA as DoRA
    from mlx_adapters.methods import DoubleSeqBN as DoubleSeqBN
    from mlx_adapters.methods import Fusion as Fusion
    from mlx_adapters.methods import LNTuning as LNTuning
    from mlx_adapters.methods import LoRA as LoRA
    from mlx_adapters.methods import LoReFT as LoReFT
    from mlx_adapters.methods import Method as Method
    from mlx_adapters.methods import Parallel as Parallel
    from mlx_adapters.methods import ParBN as ParBN
    from mlx_adapters.methods import Prefix as Prefix
    from mlx_adapters.methods import Prompt as Prompt
    from mlx_adapters.methods import PTuning as PTuning
    from mlx_adapters.methods import ScaledParBN as ScaledParBN
    from mlx_adapters.methods import SeqBN as SeqBN
    from mlx_adapters.methods import Series as Series
    from mlx_adapters.methods import VeRA as VeRA
    from mlx_adapters.models.load import LanguageModel as LanguageModel
    from mlx_adapters.study.run import study as study
    from mlx_adapters.train.callbacks import Callback as Callback
    from mlx_adapters.train.plan import MemoryPlan as MemoryPlan
    from mlx_adapters.train.plan import plan as plan
    from mlx_adapters.train.progress import Step as Step
    from mlx_adapters.train.result import TrainResult as TrainResult
    from mlx_adapters.train.trainer import Trainer as Trainer
    from mlx_adapters.train.trainer import train as train

__version__ = "0.1.0"

_FROM = {
    "adapter.attach": ("attach", "detach"),
    "adapter.folder": ("save",),
    "adapter.meta": ("AdapterMeta",),
    "api": (*("Exported", "combine", "convert", "export", "fuse", "import_adapter", "load", "load_adapter"),),
    "data.preview": ("row_statistics", "show_rows"),
    "errors": (
        *("AdapterError", "AdaptersError", "CheckpointError", "ConfigError", "DataError", "OutputError"),
        *("TrainingError", "UnsupportedError"),
    ),
    "evaluate.compare": ("Comparison", "compare"),
    "evaluate.run": ("Evaluation", "evaluate"),
    "generate.text": ("generate", "stream"),
    "methods": (
        *("DoRA", "DoubleSeqBN", "Fusion", "IA3", "LNTuning", "LoRA", "LoReFT", "Method", "PTuning"),
        *("ParBN", "Parallel", "Prefix", "Prompt", "ScaledParBN", "SeqBN", "Series", "VeRA"),
    ),
    "models.load": ("LanguageModel",),
    "study.run": ("study",),
    "train.callbacks": ("Callback",),
    "train.plan": ("MemoryPlan", "plan"),
    "train.progress": ("Step",),
    "train.result": ("TrainResult",),
    "train.trainer": ("Trainer", "train"),
}
_MODULES = {name: module for module, names in _FROM.items() for name in names}

__all__ = sorted([*_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "model":  # what `models.load` was called before 0.1.0
        return import_module("mlx_adapters.models.load")
    if name not in _MODULES:
        raise AttributeError(f"module 'mlx_adapters' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"mlx_adapters.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__


class _FrontDoor(ModuleType):
    """Some functions have the name of a package (`train`, `convert`): importing a module of that package must
    not put the package in the function's place, as it otherwise would. Modules are found as always:
    `from mlx_adapters.convert import peft`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _FrontDoor
blas.load_fast_blas()
