"""How the modules of transformers are called that hold a checkpoint's tensors.

Mostly as the checkpoint calls them. Where transformers 5 renames tensors while it loads them, its own rules
say how: `torch_names.json` holds them, by model_type, for the class that AutoModelForCausalLM opens (or
AutoModelForImageTextToText, where that opens none). `python tests/support/torch_names.py --write`, in the
repository, asks transformers for them; a test asks again.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from mlx_adapters.files.documents import from_json
from mlx_adapters.models.names import Names, Part, from_record, template

__all__ = ["TABLE", "known_names", "reads", "torch_name", "towers"]

TABLE = Path(__file__).with_name("torch_names.json")
"""`names`: {model_type: its `class`, the `prefix` of the base model in it, the names `beside` it, and
`tensors`, where mlx-lm's come from in a tiny checkpoint of the family (`names.as_record`), `rules`, each
a pattern and what takes its place, or a scope, a pattern and what takes its place below it; `reads`,
templates of the tensors that it computes text with, and `towers`, its modules that text does not pass}."""
_BACK = re.compile(r"\\(.)")


@cache
def torch_name(name: str, model_type: str) -> str:
    """What the model in PyTorch calls the checkpoint's tensor `name`, or a template of names."""
    entry = _table().get(model_type)
    if entry is None:
        return name
    prefix = entry["prefix"]
    for *scope, pattern, target in entry["rules"]:
        name = _renamed(name, pattern, target, prefix, scope[0] if scope else None)
    if not prefix or name.startswith(f"{prefix}.") or name.partition(".")[0] in entry["beside"]:
        return name
    return f"{prefix}.{name}"


def reads(model_type: str) -> frozenset[str] | None:
    """Templates of the tensors that the model in PyTorch computes text with, None where that is not known."""
    found = _table().get(model_type, {}).get("reads")
    return None if found is None else frozenset(found)


def towers(model_type: str) -> tuple[str, ...]:
    """The modules of the model in PyTorch that text does not pass: towers, and what follows them."""
    return tuple(_table().get(model_type, {}).get("towers", ()))


def known_names(model_type: str, shapes: Mapping[str, tuple[int, ...]]) -> Names | None:
    """Where the tensors of a model come from by its family, for a folder in MLX's format that does not say.

    `shapes` are the model's own. What depends on more than its sizes stays without an origin.
    """
    entry = _table().get(model_type)
    if entry is None or "tensors" not in entry:
        return None
    first: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        first.setdefault(template(name), shape)
    found = from_record(entry["tensors"])
    return Names(
        {
            name: tuple(_resized(part, first[name], parts) for part in parts)
            if all(part.scale == 1 for part in parts)
            else ()
            for name, parts in found.tensors.items()
            if name in first
        }
    )


def _resized(part: Part, shape: tuple[int, ...], parts: tuple[Part, ...]) -> Part:
    if part.stacked:
        return replace(part, stacked=shape[0])
    if part.rows is None:
        return part
    ratio = shape[part.along] / sum(one.count for one in parts)
    start, stop, step = part.rows
    return replace(part, rows=(round(start * ratio), round(stop * ratio), step))


def _renamed(name: str, pattern: str, target: str, prefix: str, scope: str | None) -> str:
    """One rule of transformers: the first place that fits is replaced, below the scope if there is one."""
    before = ""
    if scope is not None:
        scopes = [f"{prefix}.{scope}." if scope else f"{prefix}.", f"{scope}." if scope else ""]
        fits = [text for text in scopes if name.startswith(text)]
        if not fits:
            return name
        before = fits[0]
    rest = name.removeprefix(before)
    pattern = "|".join(p + r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", p) else p for p in pattern.split("|"))
    # a template's number is a digit for the rule
    found = re.search(pattern.replace(r"\d+", r"[\d#]+"), rest)
    if found is None:
        return name
    new = target.replace(r"\1", found.group(1)) if r"\1" in target else target
    return before + rest[: found.start()] + _BACK.sub(r"\1", new) + rest[found.end() :]


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = from_json(TABLE.read_text(encoding="utf-8"))
    names: dict[str, Any] = table["names"]
    return names
