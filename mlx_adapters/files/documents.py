"""JSON and YAML from strangers' files: what Python's parsers let through or trip over is a ValueError here.

A value nested a thousand deep is a RecursionError to Python, at once or when somebody copies or prints it,
and a few YAML aliases stand for gigabytes once they are written out.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from mlx_adapters.errors import AdaptersError, ConfigError

__all__ = ["from_json", "from_yaml", "json_option", "read_object", "read_options", "read_yaml", "to_json"]

_DEEP = 64  # levels; a configuration has four


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError (json's own, or for one nested deeper than 64 levels)."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, brackets)) > _DEEP:  # type: ignore[arg-type]
        _check_depth(value)
    return value


def to_json(value: Any) -> str:
    """The JSON text of a value, indented. Dataclasses, paths and tuples become objects, text and lists;
    a number that JSON cannot say (NaN, infinity) as null."""
    return json.dumps(_plain(value), indent=2)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def read_object(file: Path, kind: type[AdaptersError]) -> dict[str, Any]:
    """The object in a JSON file. Raises `kind` where it cannot be read or holds something else, and
    FileNotFoundError where there is no such file."""
    try:
        value = from_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        raise kind(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise kind(f"{file}: is not a JSON object")
    return value


def from_yaml(text: str) -> Any:
    """The value of a YAML text, plain types only. Raises ValueError for what is not YAML, has aliases, gives
    a key twice (PyYAML takes the last) or is too deep."""
    import yaml

    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEP:
                raise _too_deep()
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1  # type: ignore[union-attr]
                raise ValueError(f"line {line}: aliases (*{event.anchor}) are not read: write the value out")
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None


def read_yaml(file: Path) -> Any:
    """The value of a YAML file that the user wrote; ConfigError where it cannot be read."""
    try:
        return from_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file}: is not YAML ({error})") from None


def json_option(text: str | Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """The JSON object an option gives, as its text or from Python as a mapping; empty when it is not given,
    ConfigError for anything else."""
    if isinstance(text, Mapping):
        return dict(text)
    try:
        value = from_json(text) if text is not None else {}
    except ValueError as error:
        raise ConfigError(f"{where} {text!r:.60}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} {text!r:.60}: must be a JSON object, '{{\"name\": value}}'")
    return value


def read_options(file: Path | None, known: set[str]) -> dict[str, Any]:
    """A YAML file of options as a flat mapping, empty for None; ConfigError for anything else, and for
    unknown keys."""
    content = {} if file is None else read_yaml(file)
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must be a mapping of option names to values")
    if strange := sorted(set(map(str, content)) - known):
        raise ConfigError(f"{file}: unknown keys {', '.join(strange)}. Known: {', '.join(sorted(known))}")
    return content


def _check_keys(node: Any) -> None:
    """ValueError for a key given twice; `node` is what PyYAML composed, None for an empty text."""
    inner = node.value if node is not None and not isinstance(node.value, str) else []
    seen: set[str] = set()
    for part in inner:
        key, value = part if isinstance(part, tuple) else (None, part)
        if key is not None and isinstance(key.value, str):
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value} is given twice")
            seen.add(key.value)
        _check_keys(value)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEP):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"it is nested deeper than {_DEEP} levels")
