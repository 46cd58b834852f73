"""The values that the shell completes, for the options whose values are known.

A shell waits for them at every Tab: nothing here may load MLX. Where the library's own list stands in a
module that does, its names stand here too, and a test holds the two together.
"""

from collections.abc import Callable, Iterable
from importlib import import_module

__all__ = ["FIELDS", "among", "methods", "tasks", "templates"]

Complete = Callable[[str], list[str]]

DTYPES = ("float32", "float16", "bfloat16")
FORMATS = ("peft", "adapterhub", "llm-adapters", "mlx-lm")
LOGGERS = ("tensorboard", "wandb", "trackio")
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
TARGETS = ("transformers", "mlx")
_PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATIONS = ("linear", "cat", "svd", *_PRUNED, *(f"{name}_svd" for name in _PRUNED))


def among(values: Iterable[str]) -> Complete:
    """What completes a word to one of `values`."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def _listed(module: str, name: str) -> Complete:
    """The values that a module of the library has under that name, or that a function of it returns."""

    def complete(incomplete: str) -> list[str]:
        values = getattr(import_module(f"mlx_adapters.{module}"), name)
        return among(values() if callable(values) else values)(incomplete)

    return complete


def tasks(incomplete: str) -> list[str]:
    """The test sets and their groups; of a list joined by commas, the last."""
    from mlx_adapters.evaluate.tasks import GROUPS, names

    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in among([*names(), *GROUPS])(last)]


methods = _listed("methods", "names")
templates = _listed("data.templates", "TEMPLATES")
FIELDS: dict[str, Complete] = {
    "optimizer": _listed("train.config", "OPTIMIZER_NAMES"),
    "schedule": _listed("train.config", "SCHEDULES"),
    "on_bad_step": _listed("train.config", "BAD_STEP"),
    "compile": _listed("train.config", "COMPILE"),
    "template": templates,
    "loss_on": _listed("data.showing", "LOSS_ON"),
    "long_rows": _listed("data.showing", "LONG_ROWS"),
    "protocol": _listed("evaluate.protocol", "PROTOCOLS"),
    "decoding": _listed("evaluate.config", "DECODINGS"),
    "choices": _listed("evaluate.config", "CHOICES"),
}
"""By the name of a field of a settings' dataclass, for the options made of it."""
