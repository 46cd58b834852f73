"""A run as it is written down: the options of `mlx-adapters train`, in a YAML file and in a command.

The folder of a run keeps them, in the same form, so that `train --resume FOLDER` needs no others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

from mlx_adapters.errors import ConfigError
from mlx_adapters.fields import current, merged, parse_fields, settings, synonyms
from mlx_adapters.files.documents import read_options
from mlx_adapters.files.writing import write_json
from mlx_adapters.train.config import TrainConfig

__all__ = ["RUN", "WhatToTrain", "Written", "read_run", "remember", "several"]

RUN = "run.json"  # the options, in a run's folder
_LISTS = ("data", "exclude", "log")


@dataclass(frozen=True, kw_only=True)
class WhatToTrain:
    """The options beside the settings; lists may be given as one text."""

    model: str
    output: str
    data: Any
    method: str = "lora"
    adapter: str | None = None
    exclude: Any = ()
    log: Any = ()
    processes: int = 1
    dtype: str | None = None


@dataclass(frozen=True)
class Written:
    """A run as it was asked for: `fields` are those of the method, as texts or values; `options` is all of
    it, under the names that a run file has."""

    what: WhatToTrain
    fields: dict[str, Any]
    config: TrainConfig
    options: dict[str, Any]

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.what.output)

    def shared(self) -> "Written":
        """The run of one of its processes."""
        return replace(self, config=self.config.shared(self.what.processes))


def read_run(
    file: Path | None, given: Mapping[str, Any], set_: list[str], *, resume: bool = False
) -> Written:
    """The run of a YAML file, or of the folder that it resumes, whose values the other arguments replace.

    Args:
        file: The YAML file, or None.
        given: Fields of `WhatToTrain` and of `TrainConfig`; None is not given.
        set_: Fields of the method as `name=value`.
        resume: Whether `output` holds a run that is continued: it says what nothing else does.

    Raises:
        ConfigError: Something is missing, unknown, or of a wrong type; it names the file.
    """
    mine, training = ({field.name for field in fields_of(one)} for one in (WhatToTrain, TrainConfig))
    known = {*mine, *training, *synonyms(TrainConfig), "set"}
    given = {name: _plain(value) for name, value in given.items()}
    content = merged(current(TrainConfig, read_options(file, known)), given)
    before = Path(content["output"]) / RUN if resume and "output" in content else None
    kept = current(TrainConfig, read_options(before, known)) if before and before.is_file() else {}
    if "epochs" in content and "steps" not in content:
        kept.pop("steps", None)  # it would count more
    if missing := [name for name in ("model", "data", "output") if name not in {**kept, **content}]:
        raise ConfigError(f"missing: {', '.join(missing)}. Give them on the command line or in --config")
    new = {**_fields(content, file), **settings(set_)}
    if (start := content.get("adapter")) and (new or "method" in content):
        raise ConfigError(f"--adapter {start} brings its method and fields: leave out --method and --set")
    same_method = content.get("method", kept.get("method")) == kept.get("method")
    fields = {**(_fields(kept, before) if same_method else {}), **new}
    options = {**kept, **content, "set": fields}
    where = f"train ({file})" if file else "train"
    what = parse_fields(WhatToTrain, _only(options, mine), where=where)
    for name in _LISTS:
        if not isinstance(getattr(what, name), str | list | tuple):
            raise ConfigError(f"{where}: {name}={getattr(what, name)!r} is not text or a list of texts")
    config = parse_fields(TrainConfig, _only(options, training), where=where)
    return Written(what, fields, config, options)


def remember(run: Written) -> None:
    """Keep the options in the run's folder."""
    write_json(run.output / RUN, run.options)


def several(texts: Any) -> list[str]:
    """One text, or a list of them, as a list."""
    return [texts] if isinstance(texts, str) else [str(text) for text in texts]


def _plain(value: Any) -> Any:
    """Paths as texts; an empty list is not given."""
    if isinstance(value, list):
        return [str(one) for one in value] or None
    return str(value) if isinstance(value, Path) else value


def _fields(content: Mapping[str, Any], file: Path | None) -> dict[str, Any]:
    fields = content.get("set") or {}
    if not isinstance(fields, dict):
        raise ConfigError(f"{file}: key 'set' must be a mapping of the method's fields")
    return fields


def _only(options: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}
