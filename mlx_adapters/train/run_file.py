"""A run as it is written down: the options of `mlx-adapters train`, in a YAML file and in a command."""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

from mlx_adapters.errors import ConfigError
from mlx_adapters.fields import current, merged, parse_fields, settings, synonyms
from mlx_adapters.files.documents import read_options
from mlx_adapters.train.config import TrainConfig

__all__ = ["NAMED", "Written", "read_run"]

NAMED = ("model", "data", "output", "method")  # what a run file may name beside the settings


@dataclass(frozen=True)
class Written:
    """A run as it was asked for: `fields` are those of the method, as texts or values."""

    model: str
    data: str | list[str]
    output: Path
    method: str
    fields: dict[str, Any]
    config: TrainConfig


def read_run(
    file: Path | None,
    named: Mapping[str, Any],
    options: Mapping[str, Any],
    set_: list[str],
    *,
    start: str | Path | None = None,
) -> Written:
    """The run of a YAML file whose values the other arguments replace.

    Args:
        file: The YAML file, or None.
        named: Values for `NAMED`; None is not given.
        options: Values for the fields of `TrainConfig`; None is not given.
        set_: Fields of the method as `name=value`.
        start: An adapter to continue from, which brings its method and fields.

    Raises:
        ConfigError: Something is missing, unknown, or of a wrong type; it names the file.
    """
    known = {field.name for field in fields_of(TrainConfig)} | {*synonyms(TrainConfig), *NAMED, "set"}
    content = current(TrainConfig, read_options(file, known))
    found = {"method": "lora", **{name: content[name] for name in NAMED if name in content}}
    found = merged(found, dict(named))
    if missing := [name for name in NAMED if name not in found]:
        raise ConfigError(f"missing: {', '.join(missing)}. Give them on the command line or in --config")
    fields = content.get("set") or {}
    if not isinstance(fields, dict):
        raise ConfigError(f"{file}: key 'set' must be a mapping of the method's fields")
    fields = merged(fields, settings(set_))
    if start is not None and (fields or named["method"] is not None):
        raise ConfigError(f"--adapter {start} brings its method and fields: leave out --method and --set")
    values = {name: value for name, value in content.items() if name not in {*NAMED, "set"}}
    where = f"train ({file})" if file else "train"
    config = parse_fields(TrainConfig, merged(values, dict(options)), where=where)
    return Written(found["model"], found["data"], Path(found["output"]), found["method"], fields, config)
