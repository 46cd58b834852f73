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
from mlx_adapters.train.progress import Measured

__all__ = ["LOGGERS", "JsonLines", "Logger", "open_loggers"]

_FILE, _SAMPLES = "metrics.jsonl", "samples.jsonl"
_PROJECT = "mlx-adapters"


class Logger(Protocol):
    """What the training session needs of a place that numbers go to."""

    def log(self, step: Measured) -> None:
        """Take one step, or what was measured before the first."""
        ...

    def close(self) -> None:
        """Nothing comes any more."""
        ...


def open_loggers(names: Iterable[str], output: Path, settings: Mapping[str, Any]) -> list[Logger]:
    """JSON lines in `output`, and the named loggers; `settings` are shown there beside the run, of which
    `project`, `run_name` and `tags` say what it is called.

    Raises ConfigError for an unknown name, UnsupportedError where its package is missing.
    """
    found: list[Logger] = [JsonLines(output)]
    for name in dict.fromkeys(names):
        if name not in LOGGERS:
            raise ConfigError(unknown("logger", name, LOGGERS))
        found.append(LOGGERS[name](output, dict(settings)))
    return found


class JsonLines:
    """One JSON object a step in `metrics.jsonl`, and one a sample in `samples.jsonl`."""

    def __init__(self, output: Path) -> None:
        self.file, self.samples = output / _FILE, output / _SAMPLES

    def log(self, step: Measured) -> None:
        metrics.append(self.file, [step.record()])
        metrics.append(self.samples, [{"step": step.step, **asdict(sample)} for sample in step.samples])

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files below the output folder, by tensorboardX: `tensorboard --logdir OUTPUT`."""

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.writer = _package("tensorboardX", "tensorboard").SummaryWriter(str(output / "tensorboard"))
        self.writer.add_text(
            "settings", "\n".join(f"    {name}: {value}" for name, value in settings.items())
        )

    def log(self, step: Measured) -> None:
        for name, value in _numbers(step).items():
            self.writer.add_scalar(name, value, step.step)

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """wandb, or trackio, which has the same functions but no tags: they stand among its settings."""

    def __init__(self, package: str, output: Path, settings: dict[str, Any], **more: Any) -> None:
        self.module = _package(package, package)
        project, name = settings.get("project") or _PROJECT, settings.get("run_name") or output.name
        self.run = self.module.init(project=project, name=name, config=settings, **more)

    def log(self, step: Measured) -> None:
        self.run.log(_numbers(step), step=step.step)

    def close(self) -> None:
        self.run.finish()


def _wandb(output: Path, settings: dict[str, Any]) -> Logger:
    tags = [tag.strip() for tag in (settings.get("tags") or "").split(",") if tag.strip()]
    return Tracker("wandb", output, settings, tags=tags)


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


def _numbers(step: Measured) -> dict[str, float]:
    found = step.record()
    shares = {f"accuracy/{task}": share for task, share in found.pop("accuracies", {}).items()}
    return shares | {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and name not in ("step", "total")
    }
