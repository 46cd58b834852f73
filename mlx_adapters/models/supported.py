"""Which methods work on which architectures: a table made by trying each on a tiny model of each.

`python tests/support/support_table.py --write`, in the repository, makes the table; the tests try it again.
"""

from functools import cache
from pathlib import Path
from typing import Any

from mlx_adapters.errors import UnsupportedError, unknown
from mlx_adapters.files.documents import from_json
from mlx_adapters.models.architectures.table import architecture

__all__ = ["TABLE", "architectures", "overview", "supported", "targets"]

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


def overview(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]], list[str]]:
    """(column names, a row for each of the results of `supported`, the reasons that rows name by number).

    Reasons are without the names that their row has, so that equal ones share a number. What was compared
    equals transformers and PEFT to float32 rounding; what was only tried takes a step here, and reads a text
    alike every way.
    """
    reasons: list[str] = []
    rows = []
    for result in results:
        name, refused = result["architecture"], dict[str, int]()
        for method, reason in result["methods"].items():
            if reason:
                plain = reason.removeprefix(f"{method}: ").removeprefix(f"{name}: ")
                plain = plain.replace(f"a {name} model", "the model").replace(
                    f"this {name} model", "the model"
                )
                reasons += [plain] if plain not in reasons else []
                refused[method] = reasons.index(plain) + 1
        rows.append([name, _methods(refused, len(result["methods"])), _equal(result["compared"])])
    return ["architecture", "methods", "equal to PyTorch"], rows, reasons


def _methods(refused: dict[str, int], count: int) -> str:
    """Which of `count` methods work: all but those that are `refused`, each for the reason of its number."""
    if not refused:
        return f"all {count}"
    if len(refused) == count and len({*refused.values()}) == 1:
        return f"none ({next(iter(refused.values()))})"
    return "all but " + ", ".join(f"{method} ({number})" for method, number in refused.items())


def _equal(compared: dict[str, str | None] | None) -> str:
    if compared is None:
        return "only tried"
    equal = [what for what, reason in compared.items() if reason is None]
    return ", ".join(equal).replace("_", " ") or "nothing"


def targets(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(column names, rows) of the default targets of each of the results of `supported`."""
    known = {result["architecture"]: result["targets"] for result in results if result["targets"]}
    rows = [[name, *(" ".join(few) or "-" for few in found.values())] for name, found in known.items()]
    heads = ["architecture", *next(iter(known.values()), {})]
    return heads, rows


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = from_json(TABLE.read_text(encoding="utf-8"))
    return table
