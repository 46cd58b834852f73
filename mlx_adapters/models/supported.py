"""Which methods work on which architectures: a table made by trying each on a tiny model of each.

`python tests/support/support_table.py --write`, in the repository, makes the table; the tests try it again.
"""

from functools import cache
from pathlib import Path
from typing import Any

from mlx_adapters.errors import UnsupportedError, unknown
from mlx_adapters.files.documents import from_json
from mlx_adapters.models.architectures.table import architecture

__all__ = ["TABLE", "architectures", "cells", "compared", "side_by_side", "supported", "targets"]

TABLE = Path(__file__).with_name("supported.json")
"""`architectures`: {name: {"refused": a reason for each method that does not work, or one for all of them,
"targets": default targets by method, or null where no model runs}}; `files`: {model_type: the architecture
whose model file mlx-lm reads it by}; `compared`: {model_type: {what was compared with PyTorch: null where it
is equal, else why not}}, from the tests of the families; `versions` of the packages the table was made with.
"""


def architectures() -> list[str]:
    """Every architecture of the table."""
    return list(_table()["architectures"])


def supported(model_type: str, methods: list[str]) -> dict[str, Any]:
    """What works on `model_type`, as `mlx-adapters models --json` says it.

    `methods` are the names to answer for: each has the reason why it does not work, None where it does.
    `compared` says of logits, adapters by method and fused checkpoints why they do not equal PyTorch's, None
    where they do; it is None where the architecture was only tried here. Raises UnsupportedError, with the
    known ones, for another architecture.
    """
    table = _table()
    entry = table["architectures"].get(table["files"].get(model_type, model_type))
    if entry is None:
        raise UnsupportedError(unknown("architecture", model_type, table["architectures"]))
    refused = entry["refused"]
    reasons = dict.fromkeys(methods, refused) if isinstance(refused, str) else refused
    return {
        "architecture": model_type,
        "in_table": bool(architecture(model_type).attn),
        "methods": {method: reasons.get(method) for method in methods},
        "targets": entry["targets"],
        "compared": table["compared"].get(model_type),
    }


def cells(results: list[dict[str, Any]]) -> tuple[dict[str, list[str]], list[str]]:
    """({method: a cell for each of the results of `supported`}, the reasons that cells name by number).

    Reasons are without the names that their row and column have, so that equal ones share a number.
    """
    reasons: list[str] = []
    columns: dict[str, list[str]] = {method: [] for method in results[0]["methods"]}
    for result in results:
        name = result["architecture"]
        for method, reason in result["methods"].items():
            if not reason:
                columns[method].append("yes")
                continue
            plain = reason.removeprefix(f"{method}: ").removeprefix(f"{name}: ")
            plain = plain.replace(f"a {name} model", "the model").replace(f"this {name} model", "the model")
            if plain not in reasons:
                reasons.append(plain)
            columns[method].append(f"no {reasons.index(plain) + 1}")
    return columns, reasons


def side_by_side(columns: dict[str, list[str]], room: int) -> list[list[str]]:
    """The methods in groups whose columns of `cells` stand beside each other in `room` characters."""
    groups: list[list[str]] = [[]]
    left = room
    for method, found in columns.items():
        width = max(map(len, (*method.split("_"), *found))) + 3
        if groups[-1] and width > left:
            groups.append([])
            left = room
        groups[-1].append(method)
        left -= width
    return groups


def targets(results: list[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """(title, column names, rows) of the default targets of each of the results of `supported`."""
    known = {result["architecture"]: result["targets"] for result in results if result["targets"]}
    rows = [[name, *(" ".join(few) or "-" for few in found.values())] for name, found in known.items()]
    heads = ["architecture", *next(iter(known.values()), {})]
    return "Default targets (--set targets=... chooses others)", heads, rows


def compared(results: list[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """(title, column names, rows) of what equals PyTorch. What was only tried takes a step here, and reads a
    text alike every way."""
    rows = []
    for result in results:
        found = result["compared"]
        equal = [what.replace("_", " ") for what, reason in (found or {}).items() if reason is None]
        rows.append([result["architecture"], ", ".join(equal) or ("nothing" if found else "only tried")])
    return (
        "Compared with transformers and PEFT, and equal to float32 rounding",
        ["architecture", "equal"],
        rows,
    )


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = from_json(TABLE.read_text(encoding="utf-8"))
    return table
