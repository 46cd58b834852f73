"""The adapter methods: one file each, and the folder is the registry.

A method's file defines `Config`, `Layer`, `PEFT_TYPE`, `to_peft`, `from_peft`, and either `targets` and
`wrap`, or `place` where the adapter is not one layer on each chosen linear layer. Nothing outside the file
knows the method. `register` adds one from outside the package.

Optional, each in the method's file:

    LAYERS              the layer classes when there are more than `Layer`
    claims(fields)      whether PEFT's configuration is this method's, where several share a `PEFT_TYPE`
    peft_extra(layers, model, model_type)   fields of `adapter_config.json` that depend on the model
    PEFT_FIELDS         what is known of PEFT's configuration (methods/peft_fields.py); the rest is refused
    IN_PEFT = False     no PEFT release has the method: the file format is ours or another project's
    AUTO_MODEL = False  transformers' own loader refuses what PEFT opens
    rates(config)       how many times faster than the others an attribute learns
    as_saved(config)    the configuration of the saved folder, where it is another than the trained one
    with_tokenizer(config, tokenizer)   the configuration, completed by what only the tokenizer knows
    trial_fields(fresh, base, folder)   fields to try the method with, where its defaults are not enough
    keep(folder, layers)    writes what else an adapter's folder needs,
    kept(folder, config)    the configuration that finds it there
"""

import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mlx_adapters.errors import AdapterError, ConfigError, unknown
from mlx_adapters.fields import parse_fields

if TYPE_CHECKING:  # the names alone are asked for at every Tab in a shell, and MLX takes its time to load
    import mlx.nn as nn

    from mlx_adapters.methods.base import AdapterLayer

__all__ = [
    "by_peft_fields",
    "config_class",
    "get",
    "in_peft",
    "layer_classes",
    "make_config",
    "names",
    "place",
    "register",
]

_OUTSIDE: dict[str, ModuleType] = {}
_SHARED = {"base", "bottleneck", "experts", "modules", "patterns", "peft_fields", "pissa"}
"""Files of the folder that are not methods but what several of them share."""


@cache
def _inside() -> frozenset[str]:
    return frozenset(module.name for module in pkgutil.iter_modules(__path__)) - _SHARED


def names() -> list[str]:
    """The known methods, sorted."""
    return sorted(_inside() | _OUTSIDE.keys())


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


def layer_classes(name: str) -> "tuple[type[AdapterLayer], ...]":
    """The layer classes of a method."""
    module = get(name)
    return getattr(module, "LAYERS", (module.Layer,))


def in_peft(name: str) -> bool:
    """Whether PEFT itself opens this method's folders."""
    return getattr(get(name), "IN_PEFT", True)


def place(
    name: str, model: "nn.Module", model_type: str, config: Any, paths: list[str] | None = None
) -> "dict[str, nn.Module]":
    """What the method puts where, by path: adapter layers, and whatever else it needs in the tree.

    `paths` are the layers that a saved adapter names; without them the configuration chooses.
    """
    from mlx_adapters.methods.base import site_of

    module = get(name)
    if hasattr(module, "place"):
        placed: dict[str, nn.Module] = module.place(model, model_type, config, paths)
        return placed
    modules = dict(model.named_modules())
    chosen = module.targets(model, model_type, config) if paths is None else paths
    return {path: module.wrap(modules[path], config, site_of(path, model, model_type)) for path in chosen}


def by_peft_fields(fields: dict[str, Any]) -> str:
    """The method that reads and writes an `adapter_config.json`, by its `peft_type`."""
    found = [name for name in names() if fields.get("peft_type") == get(name).PEFT_TYPE]
    if not found:
        known = {get(name).PEFT_TYPE for name in names()}
        raise AdapterError(unknown("peft_type", str(fields.get("peft_type")), known))
    claiming = [name for name in found if getattr(get(name), "claims", lambda fields: True)(fields)]
    return claiming[0] if claiming else found[0]
