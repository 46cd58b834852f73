"""The table of support that the wheel ships, made by trying every method on a tiny model of each one.

python tests/support/support_table.py --write     tries all of them, and writes the table
python tests/support/support_table.py --compared  writes only what was compared with PyTorch
python tests/support/support_table.py NAME ...    prints what the trials of these give
"""

import argparse
import json
from importlib import metadata
from typing import Any

from families import FAMILIES, WRAPPERS, model_type_of
from family_exceptions import KNOWN, REFUSED, exception
from gguf_cases import CASES
from mlx_lm.utils import MODEL_REMAPPING
from samples import architectures
from trials import support, targets

import mlx_adapters  # noqa: F401  (a fast BLAS before MLX)
from mlx_adapters.errors import UnsupportedError
from mlx_adapters.models.architectures.table import ARCHITECTURES, with_layers
from mlx_adapters.models.supported import TABLE

__all__ = ["compared", "entry", "files", "names", "written"]


def names() -> list[str]:
    """What the table has an entry for: every model file, and every row that names layers."""
    return sorted({*architectures(), *with_layers()})


def entry(name: str) -> dict[str, Any]:
    """The entry of one architecture: what is refused, and the default targets (None where nothing runs)."""
    try:
        reasons = support(name)
    except UnsupportedError as error:
        return {"refused": str(error), "targets": None}
    refused = {method: reason for method, reason in reasons.items() if reason}
    same = len(refused) == len(reasons) and len(set(refused.values())) == 1
    return {"refused": next(iter(refused.values())) if same else refused, "targets": targets(name)}


def files() -> dict[str, str]:
    """Other names of architectures: {model_type: the one whose model file mlx-lm reads it by}."""
    alone = {name: row.file for name, row in ARCHITECTURES.items() if row.file}
    return {name: file for name, file in sorted((MODEL_REMAPPING | alone).items()) if name not in names()}


# The claims of `family_trials` that compare with PyTorch, by what the table calls them.
_COMPARED = {
    "logits": ("whole", "cached", "batched"),
    **{method: (method,) for method in ("lora", "dora", "series", "prefix", "ln_tuning")},
    "fused": ("converted", "fused"),
}


def compared() -> dict[str, dict[str, str | None]]:
    """{model_type of a family: {what was compared with PyTorch: why it is not equal, None where it is}}.

    `test_families.py` tries each claim, and fails where the lists of exceptions say otherwise than it finds;
    `test_gguf_families.py` compares the logits of a GGUF file.
    """
    from_gguf = {model_type_of(name) for name in CASES}
    return {
        name: {what: _exception(name, claims) for what, claims in _COMPARED.items()}
        | ({"gguf": None} if name in from_gguf else {})
        for name in sorted({*FAMILIES, *WRAPPERS})
        if name == model_type_of(name)
    }


def _exception(name: str, claims: tuple[str, ...]) -> str | None:
    found = (exception(listed, name, claim) for claim in claims for listed in (REFUSED, KNOWN))
    return next((words for words in found if words), None)


def written() -> dict[str, Any]:
    """The whole table."""
    versions = {name: metadata.version(name) for name in ("mlx", "mlx-lm")}
    return {
        "versions": versions,
        "files": files(),
        "compared": compared(),
        "architectures": {name: entry(name) for name in names()},
    }


def as_text(table: dict[str, Any]) -> str:
    """The table as JSON, each architecture a line."""
    *others, (last, entries) = table.items()
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in others]
    rows = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items()]
    return ",\n".join(["{" + lines[0], *lines[1:], f"{json.dumps(last)}: {{\n" + ",\n".join(rows)]) + "\n}}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--compared", action="store_true", help="write that part alone")
    arguments = parser.parse_args()
    if arguments.compared:
        kept = json.loads(TABLE.read_text(encoding="utf-8"))
        parts = {"files": files(), "compared": compared(), "architectures": kept.pop("architectures")}
        TABLE.write_text(as_text({"versions": kept["versions"], **parts}), encoding="utf-8")
    if arguments.write:
        TABLE.write_text(as_text(written()), encoding="utf-8")
    for name in arguments.names:
        print(name, json.dumps(entry(name), indent=1))


if __name__ == "__main__":
    main()
