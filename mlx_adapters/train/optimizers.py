"""Optimizers of mlx.optimizers by name, their schedules, and learning-rate multipliers by group."""

import inspect
import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_adapters.errors import ConfigError, unknown
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.length import warmup_steps

__all__ = ["COPIES", "OPTIMIZERS", "kinds_of", "learning_rate", "make_optimizer"]

COPIES = 4
"""What a trained array takes in all: itself, its gradient, and the optimizer's two moments."""

# name: (class, the arguments that differ from the class's defaults)
OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "adamw": (optim.AdamW, {"bias_correction": True}),  # MLX's default is off; torch and the paper have it
    "adam": (optim.Adam, {"bias_correction": True}),
    "lion": (optim.Lion, {}),
    # the learning rate counts as it is, as in transformers' trainer, not relative to the size of the weights
    "adafactor": (optim.Adafactor, {"relative_step": False, "scale_parameter": False}),
    "muon": (optim.Muon, {}),
    "sgd": (optim.SGD, {}),
}
_CHOSEN_ELSEWHERE = {"learning_rate", "weight_decay"}


def learning_rate(config: TrainConfig, total: int, factor: float = 1.0) -> Callable[[mx.array], mx.array]:
    """`factor` times the rate by step: transformers' schedules of one step more, without their first, whose
    rate is 0. A warm-up of n steps goes by 1/(n+1) of the rate up to n/(n+1); a decay would end at 0."""
    warmup = warmup_steps(config, total)
    rest = max(1, total - warmup)
    peak = config.lr * factor
    after = {
        "linear": lambda: optim.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optim.cosine_decay(peak, rest),
        "constant": lambda: lambda step: mx.array(peak),
    }[config.schedule]()
    if not warmup:
        return after
    return optim.join_schedules([optim.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])


def make_optimizer(
    config: TrainConfig,
    total: int,
    parameters: Any,
    rates: Mapping[str, float] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> optim.Optimizer:
    """The optimizer of a run of `total` steps over the tree `parameters`, with its state.

    `rates` are the method's own learning-rate multipliers by an array's last name; those of `config.rates`
    come before them. `kinds` are those of the modules that hold the arrays, by path: weight decay leaves
    norms out by what they are, as transformers' trainer does, for gpt2 calls one ln_1. Arrays with the same
    multiplier and the same weight decay form a group. Raises ConfigError for an unknown argument, or a
    pattern that no array has.
    """
    paths = [path for path, _ in tree_flatten(parameters)]
    multipliers = _multipliers(config.rates)
    excluded = _patterns(config.no_decay)
    for pattern in multipliers:
        if not any(_matches(path, pattern) for path in paths):
            raise ConfigError(f"rates: no trained array matches {pattern!r}. There are {_last_names(paths)}")

    def group(path: str, array: mx.array) -> tuple[float, bool, bool]:
        """(factor on the rate, whether it decays, whether it is a matrix)."""
        own = (rates or {}).get(path.rpartition(".")[2], 1.0)
        factor = next((by for pattern, by in multipliers.items() if _matches(path, pattern)), own)
        kind = (kinds or {}).get(path, "")
        spared = any(_matches(path, pattern) or fnmatchcase(kind, pattern) for pattern in excluded)
        decays = config.weight_decay > 0 and not spared
        return factor, decays, config.optimizer != "muon" or array.ndim > 1

    groups = list(dict.fromkeys(group(path, array) for path, array in tree_flatten(parameters)))
    members = [_build(config, total, *key) for key in groups]
    filters = [lambda path, array, key=key: group(path, array) == key for key in groups[:-1]]
    optimizer = members[0] if len(members) == 1 else optim.MultiOptimizer(members, filters)
    optimizer.init(parameters)
    return optimizer


def kinds_of(model: nn.Module) -> dict[str, str]:
    """The kind of module, in small letters, that holds each trained array."""
    return {
        f"{path}.{name}" if path else name: type(module).__name__.lower()
        for path, module in model.named_modules()
        for name, value in module.trainable_parameters().items()
        if isinstance(value, mx.array)
    }


def _build(config: TrainConfig, total: int, factor: float, decays: bool, matrix: bool) -> optim.Optimizer:
    # Muon orthogonalises matrices; its authors give vectors to AdamW
    name = config.optimizer if matrix else "adamw"
    kind, defaults = OPTIMIZERS[name]
    decay = config.weight_decay if decays else 0.0
    if "weight_decay" in inspect.signature(kind).parameters:
        defaults = defaults | {"weight_decay": decay}
    elif config.weight_decay:
        raise ConfigError(f"weight_decay={config.weight_decay}: {name} has none. Use adamw")
    arguments = _arguments(config.optimizer_args, kind) if name == config.optimizer else {}
    return kind(learning_rate=learning_rate(config, total, factor), **(defaults | arguments))


def _arguments(text: str | None, kind: type) -> dict[str, Any]:
    """`momentum=0.9,betas=0.9:0.95` as keyword arguments of `kind`."""
    known = [name for name in inspect.signature(kind).parameters if name not in _CHOSEN_ELSEWHERE]
    found: dict[str, Any] = {}
    for name, value in _pairs(text, "optimizer_args"):
        if name not in known:
            raise ConfigError("optimizer_args: " + unknown("argument", name, known))
        try:
            found[name] = _value(value)
        except ValueError:
            raise ConfigError(
                f"optimizer_args: {name}={value} is not a number, true, false or a list like 0.9:0.95"
            ) from None
    return found


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if ":" in text:
        return [float(part) for part in text.split(":")]
    return int(text) if text.isdigit() else float(text)


def _multipliers(text: str | None) -> dict[str, float]:
    found = {}
    for pattern, value in _pairs(text, "rates"):
        try:
            found[pattern] = float(value)
        except ValueError:
            found[pattern] = math.nan
        if not (math.isfinite(found[pattern]) and found[pattern] >= 0):
            raise ConfigError(f"rates: {pattern}={value} must be a finite number, 0 or more")
    return found


def _pairs(text: str | None, where: str) -> list[tuple[str, str]]:
    pairs = []
    for part in _patterns(text):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"{where}: {part!r} must be written as name=value")
        pairs.append((name.strip(), value.strip()))
    return pairs


def _patterns(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _matches(path: str, pattern: str) -> bool:
    """Whether the pattern is the array's last name, or fits its whole path."""
    return path.rpartition(".")[2] == pattern or fnmatchcase(path, pattern)


def _last_names(paths: list[str]) -> str:
    return ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
