"""Every field of a method is an option of its own: `--rank 16` stands for `--set rank=16`."""

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

__all__ = ["fields_of_method", "spelled"]

_PEFT = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets"}


def spelled(args: list[str], options: dict[str, Any]) -> list[str]:
    """The arguments, with a field of a method as `--set field=value` where the command has `--set`.

    Args:
        args: what stands behind the command.
        options: the command's options by their names, such as `--lr`.
    """
    found, rest = list[str](), list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*found, word, *rest]
        name, equals, value = word.partition("=")
        if word == "--resume" and _names_a_folder(rest, args) and "--output" in options:
            found += [word, "--output", rest.pop(0)]
            continue
        if name in options:
            found.append(word)
            if not equals and rest and not options[name].is_flag:
                found.append(rest.pop(0))  # its value, whatever it looks like
        elif name.startswith("--") and "--set" in options and (field := _field_name(name)) in _fields():
            if not equals:
                alone = not rest or (_fields()[field] and rest[0].startswith("-"))
                value = "true" if alone else rest.pop(0)
            found += ["--set", f"{field}={value}"]
        else:
            found.append(word)
    return found


def _names_a_folder(rest: list[str], args: list[str]) -> bool:
    """Whether `--resume` is followed by what it resumes: `train --resume my-adapter`."""
    return bool(rest) and not rest[0].startswith("-") and "--output" not in args and Path(rest[0]).exists()


def fields_of_method(args: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """(the method that `args` name, its fields as options with their help)."""
    from mlx_adapters import methods

    named = [after for word, after in pairwise(args) if word == "--method"]
    method = named[-1] if named and named[-1] in methods.names() else "lora"
    rows = []
    for row in methods.about(method)["fields"]:
        default = f" [default: {row['default']}]" if row["default"] != "" else ""
        rows.append((f"--{row['name'].replace('_', '-')}", row["help"] + default))
    return method, rows


def _field_name(option: str) -> str:
    """`lora_alpha` of PEFT is `alpha` here, for every method that has one."""
    name = option[2:].replace("-", "_")
    return _PEFT.get(name, name)


@cache
def _fields() -> dict[str, bool]:
    """The fields of all methods, and whether each is a switch."""
    from mlx_adapters import methods

    rows = [row for name in methods.names() for row in methods.about(name)["fields"]]
    return {row["name"]: isinstance(row["default"], bool) for row in rows}
