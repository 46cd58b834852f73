"""Where the numbers of a run go: JSON lines always, and what `train --log` names besides.

A logger is three functions: it is opened with the run's settings, gets every `Step`, and is closed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from mlx_adapters.errors import ConfigError, UnsupportedError, unknown
from mlx_adapters.train import metrics
from mlx_adapters.train.progress import Step

__all__ = ["LOGGERS", "JsonLines", "Logger", "open_loggers"]

_FILE = "metrics.jsonl"


class Logger(Protocol):
    """What the training session needs of a place that numbers go to."""

    def log(self, step: Step) -> None:
        """Take one step."""
        ...

    def close(self) -> None:
        """Nothing comes any more."""
        ...


def open_loggers(names: Iterable[str], output: Path, settings: Mapping[str, Any]) -> list[Logger]:
    """JSON lines in `output`, and the named loggers; `settings` are shown there beside the run.

    Raises ConfigError for an unknown name, UnsupportedError where its package is missing.
    """
    found: list[Logger] = [JsonLines(output / _FILE)]
    for name in dict.fromkeys(names):
        if name not in LOGGERS:
            raise ConfigError(unknown("logger", name, LOGGERS))
        found.append(LOGGERS[name](output, dict(settings)))
    return found


class JsonLines:
    """One JSON object a step in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def log(self, step: Step) -> None:
        metrics.append(self.file, step)

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files below the output folder, by tensorboardX: `tensorboard --logdir OUTPUT`."""

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.writer = _package("tensorboardX", "tensorboard").SummaryWriter(str(output / "tensorboard"))
        self.writer.add_text(
            "settings", "\n".join(f"    {name}: {value}" for name, value in settings.items())
        )

    def log(self, step: Step) -> None:
        for name, value in _numbers(step).items():
            self.writer.add_scalar(name, value, step.step)

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """wandb, or trackio, which has the same functions; the project is named after this library."""

    def __init__(self, package: str, output: Path, settings: dict[str, Any]) -> None:
        self.module = _package(package, package)
        self.run = self.module.init(project="mlx-adapters", name=output.name, config=settings)

    def log(self, step: Step) -> None:
        self.run.log(_numbers(step), step=step.step)

    def close(self) -> None:
        self.run.finish()


def _wandb(output: Path, settings: dict[str, Any]) -> Logger:
    return Tracker("wandb", output, settings)


def _trackio(output: Path, settings: dict[str, Any]) -> Logger:
    return Tracker("trackio", output, settings)


LOGGERS: dict[str, Callable[[Path, dict[str, Any]], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def _package(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise UnsupportedError(
            f'--log {extra} needs the package {name}: pip install "mlx-adapters[{extra}]"'
        ) from None


def _numbers(step: Step) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in asdict(step).items()
        if isinstance(value, (int, float)) and name not in ("step", "total")
    }
