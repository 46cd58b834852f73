"""The values that the shell completes, for the options whose values are known.

A shell waits for them at every Tab: nothing here may load MLX. Where the library's own list stands in a
module that does, its names stand here too, and a test holds the two together.
"""

from collections.abc import Callable, Iterable

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

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def methods(incomplete: str) -> list[str]:
    """The adapter methods."""
    from mlx_adapters.methods import names

    return among(names())(incomplete)


def tasks(incomplete: str) -> list[str]:
    """The test sets and their groups; of a list joined by commas, the last."""
    from mlx_adapters.evaluate.tasks import GROUPS, names

    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in among([*names(), *GROUPS])(last)]


def templates(incomplete: str) -> list[str]:
    """The prompt templates."""
    from mlx_adapters.data.templates import TEMPLATES

    return among(TEMPLATES)(incomplete)


def loss_on(incomplete: str) -> list[str]:
    """What the loss may be taken on."""
    from mlx_adapters.data.tokens import LOSS_ON

    return among(LOSS_ON)(incomplete)


def _config(name: str) -> Complete:
    def complete(incomplete: str) -> list[str]:
        from mlx_adapters.train import config

        return among(getattr(config, name))(incomplete)

    return complete


FIELDS: dict[str, Complete] = {
    "optimizer": _config("OPTIMIZER_NAMES"),
    "schedule": _config("SCHEDULES"),
    "on_bad_step": _config("BAD_STEP"),
    "compile": _config("COMPILE"),
    "template": templates,
    "loss_on": loss_on,
}
"""By the name of a field of a settings' dataclass, for the options made of it."""
