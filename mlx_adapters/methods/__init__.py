"""The adapter methods: one file each, and the folder is the registry.

A method's file holds a subclass of `Method` (methods/base.py) whose `NAME` is the file's, and its layers.
Nothing outside the file knows the method. `register` adds one from outside the package.

    from mlx_adapters.methods import LoRA
    LoRA(rank=16)
    make("lora", {"rank": "16"})    the same, from the texts of a command line or of a YAML file
"""

import importlib
import pkgutil
from dataclasses import fields as fields_of
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_adapters.errors import AdapterError, ConfigError, unknown
from mlx_adapters.fields import parse_fields

if TYPE_CHECKING:  # the names alone are asked for at every Tab in a shell, and MLX takes its time to load
    from mlx_adapters.methods.base import Method
    from mlx_adapters.methods.dora import DoRA
    from mlx_adapters.methods.double_seq_bn import DoubleSeqBN
    from mlx_adapters.methods.fusion import Fusion
    from mlx_adapters.methods.ia3 import IA3
    from mlx_adapters.methods.ln_tuning import LNTuning
    from mlx_adapters.methods.lora import LoRA
    from mlx_adapters.methods.loreft import LoReFT
    from mlx_adapters.methods.par_bn import ParBN
    from mlx_adapters.methods.parallel import Parallel
    from mlx_adapters.methods.prefix import Prefix
    from mlx_adapters.methods.prompt import Prompt
    from mlx_adapters.methods.ptuning import PTuning
    from mlx_adapters.methods.scaled_par_bn import ScaledParBN
    from mlx_adapters.methods.seq_bn import SeqBN
    from mlx_adapters.methods.series import Series
    from mlx_adapters.methods.vera import VeRA

__all__ = [
    "DoRA",
    "DoubleSeqBN",
    "Fusion",
    "IA3",
    "LNTuning",
    "LoRA",
    "LoReFT",
    "Method",
    "PTuning",
    "ParBN",
    "Parallel",
    "Prefix",
    "Prompt",
    "ScaledParBN",
    "SeqBN",
    "Series",
    "VeRA",
    "about",
    "claiming",
    "find",
    "make",
    "names",
    "register",
]

M = TypeVar("M", bound="type[Method]")
_OUTSIDE: dict[str, "type[Method]"] = {}
_SHARED = {
    *("activations", "base", "bottleneck", "dropout", "experts", "modules", "patterns", "peft_fields"),
    *("pissa", "beside", "biases", "low_rank", "tied", "tokens"),
}
"""Files of the folder that are not methods but what several of them share."""


def __getattr__(name: str) -> "type[Method]":
    """A public class, whose file is imported when it is first asked for: SeqBN stands in seq_bn.py."""
    files = {file.replace("_", ""): file for file in _inside()} | {"method": "base"}
    if name not in __all__ or name.lower() not in files:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: type[Method] = getattr(importlib.import_module(f"{__name__}.{files[name.lower()]}"), name)
    return found


@cache
def _inside() -> frozenset[str]:
    return frozenset(module.name for module in pkgutil.iter_modules(__path__)) - _SHARED


def names() -> list[str]:
    """The names of the known methods, sorted. Imports none of them."""
    return sorted(_inside() | _OUTSIDE.keys())


def register(method: M) -> M:
    """Make a method defined outside the package known under its NAME; returns it, to be used as a decorator.

    Raises ConfigError where the name is taken.
    """
    if method.NAME in names():
        raise ConfigError(f"method {method.NAME!r} exists already: choose another name")
    _OUTSIDE[method.NAME] = method
    return method


def find(name: str) -> "type[Method]":
    """The class of method `name`; ConfigError lists the known ones."""
    from mlx_adapters.methods.base import Method

    if name not in names():
        raise ConfigError(unknown("method", name, names()))
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    defined = vars(importlib.import_module(f"{__name__}.{name}")).values()
    methods = (one for one in defined if isinstance(one, type) and issubclass(one, Method))
    return next(method for method in methods if vars(method).get("NAME") == name)


def make(name: str, fields: dict[str, Any], *, where: str | None = None) -> "Method":
    """The method `name` with options from `{field: text or value}`, as `--set` and YAML give them.

    `where` is what errors call the place of the fields: the name by default. Raises one ConfigError that
    lists every mistake.
    """
    return parse_fields(find(name), fields, where=where or name)


def about(name: str) -> dict[str, Any]:
    """What there is to know of the method `name`, as `mlx-adapters methods --json` says it."""
    method = find(name)
    return {
        "method": name,
        "what": method.TITLE,
        "authors": method.AUTHORS,
        "paper": method.PAPER,
        "stands_on": method.STANDS_ON,
        "mergeable": method.mergeable(),
        "in_peft": method.IN_PEFT,
        "fields": [
            {"name": f.name, "default": f.default, "help": f.metadata["help"]} for f in fields_of(method)
        ],
        "doc": method.explanation(),
    }


def claiming(fields: dict[str, Any]) -> "type[Method]":
    """The method that reads and writes an `adapter_config.json`, by its `peft_type`."""
    known = [find(name) for name in names()]
    found = [method for method in known if fields.get("peft_type") == method.PEFT_TYPE]
    if not found:
        raise AdapterError(
            unknown("peft_type", str(fields.get("peft_type")), {method.PEFT_TYPE for method in known})
        )
    return next((method for method in found if method.claims(fields)), found[0])
