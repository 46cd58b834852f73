"""Dataclass fields as the one declaration of an option: flags, YAML and saved JSON follow from them.

Imports nothing heavy: the command line reads these declarations before it knows whether MLX is needed.
"""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeVar

from mlx_adapters.errors import ConfigError, unknown

__all__ = ["current", "field", "merged", "parse_fields", "settings", "synonyms"]

T = TypeVar("T")


def field(default: Any, help: str, *also: str) -> Any:
    """A dataclass field with the help text that the command line, YAML and docs show; `also` are other names
    of its option, which other programs or earlier versions have for it."""
    return dataclasses.field(default=default, metadata={"help": help, "also": also})


def synonyms(config_class: type) -> dict[str, str]:
    """{another name of a field: the field}."""
    fields = dataclasses.fields(config_class)
    return {name: field.name for field in fields for name in field.metadata.get("also", ())}


def current(config_class: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under the fields' own names. ConfigError for a field under two names."""
    others, found = synonyms(config_class), dict[str, Any]()
    for name, value in settings.items():
        if (own := others.get(name, name)) in found:
            raise ConfigError(f"{own} is given under two names: leave one of them out")
        found[own] = value
    return found


def merged(*layers: dict[str, Any]) -> dict[str, Any]:
    """Later layers win; None means not set."""
    result: dict[str, Any] = {}
    for layer in layers:
        result |= {name: value for name, value in layer.items() if value is not None}
    return result


def settings(pairs: list[str], where: str = "--set") -> dict[str, str]:
    """`["rank=8,alpha=16", ...]` as a mapping; ConfigError for an entry without `=`.

    A value may hold commas too: a new name begins where a word and `=` follow one.
    """
    found = {}
    for pair in chain.from_iterable(re.split(r",(?=\s*[A-Za-z_]+=)", text) for text in pairs):
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"{where} {pair!r}: write it as name=value")
        if name.strip() in found:
            raise ConfigError(f"{where} {pair!r}: {name.strip()} is set twice: give it once")
        found[name.strip()] = value.strip()
    return found


def parse_fields(config_class: type[T], settings: dict[str, Any], *, where: str) -> T:
    """Build `config_class` from `{field: text or value}`; every mistake is reported in one ConfigError."""
    annotated = typing.get_type_hints(config_class)
    hints = {field.name: annotated[field.name] for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    problems, values = [], {}
    for name, raw in current(config_class, settings).items():
        if name not in hints:
            problems.append(unknown(f"field of {where}", name, hints))
            continue
        try:
            values[name] = _parse(raw, hints[name])
        except ValueError:
            problems.append(f"{where}: {name}={raw!r} is not {_type_name(hints[name])}")
    if problems:
        raise ConfigError("; ".join(problems))
    return config_class(**values)


def _parse(raw: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        if raw is None or (isinstance(raw, str) and raw.lower() == "none"):
            if type(None) in hint.__args__:
                return None
            raise ValueError
        if type(raw) in hint.__args__ and not isinstance(raw, str):  # of `int | float` 1.0 is not 1
            return raw
        for kind in hint.__args__:
            try:
                if kind is not type(None):
                    return _parse(raw, kind)
            except ValueError:
                continue  # `float | str`: a number if it is one, else a word
        raise ValueError
    if hint is Any:
        return raw
    if hint is bool:
        if isinstance(raw, bool):
            return raw
        return (
            {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}[str(raw).lower()]
            if str(raw).lower() in ("true", "false", "1", "0", "yes", "no")
            else _fail()
        )
    if hint in (int, float):
        if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
            raise ValueError
        if hint is int and isinstance(raw, float) and not raw.is_integer():
            raise ValueError
        return hint(raw)
    if hint is str and isinstance(raw, str):
        return raw
    if hint is str and isinstance(raw, (list, tuple)):
        return ",".join(map(str, raw))
    if hint is str and isinstance(raw, Mapping):  # as it is written on a command line
        try:
            return json.dumps(raw, ensure_ascii=False)
        except TypeError:  # a value that JSON does not have
            raise ValueError from None
    raise ValueError


def _fail() -> Any:
    raise ValueError


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if isinstance(hint, types.UnionType):
        return " or ".join("none" if arg is type(None) else names.get(arg, str(arg)) for arg in hint.__args__)
    return names.get(hint, str(hint))
