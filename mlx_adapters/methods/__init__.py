"""The adapter methods: one file each, and the folder is the registry.

A method's file defines `Config`, `Layer`, `targets`, `wrap`, `to_peft`, `from_peft` and `PEFT_TYPE`; nothing
outside it knows the method. `register` adds one from outside the package.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from mlx_adapters.errors import AdapterError, ConfigError, unknown
from mlx_adapters.fields import parse_fields

__all__ = ["by_peft_type", "config_class", "get", "make_config", "names", "register"]

_OUTSIDE: dict[str, ModuleType] = {}


def names() -> list[str]:
    """The known methods, sorted."""
    inside = {module.name for module in pkgutil.iter_modules(__path__)} - {"base"}
    return sorted(inside | set(_OUTSIDE))


def register(name: str, module: ModuleType) -> None:
    """Make a method defined outside the package known under `name`."""
    if name in names():
        raise ConfigError(f"method {name!r} exists already: choose another name")
    _OUTSIDE[name] = module


def get(name: str) -> Any:
    """The module of method `name`; ConfigError lists the known ones."""
    if name not in names():
        raise ConfigError(unknown("method", name, names()))
    return _OUTSIDE.get(name) or importlib.import_module(f"{__name__}.{name}")


def config_class(name: str) -> type:
    """The dataclass of a method's fields; help texts are in each field's metadata."""
    return get(name).Config


def make_config(name: str, settings: dict[str, Any]) -> Any:
    """A method's configuration from `{field: text or value}`, as `--set` and YAML give them."""
    return parse_fields(config_class(name), settings, where=name)


def by_peft_type(peft_type: str) -> str:
    """The method that reads and writes PEFT's `peft_type`."""
    known = {get(name).PEFT_TYPE: name for name in names()}
    if peft_type not in known:
        raise AdapterError(unknown("peft_type", peft_type, known))
    return known[peft_type]
