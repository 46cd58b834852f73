"""The table of support that the wheel ships, made by trying every method on a tiny model of each one.

python tests/support/support_table.py --write     tries all of them, and writes the table
python tests/support/support_table.py NAME ...    prints what the trials of these give
"""

import argparse
import json
from importlib import metadata
from typing import Any

from mlx_lm.utils import MODEL_REMAPPING
from samples import architectures
from trials import support, targets

import mlx_adapters  # noqa: F401  (a fast BLAS before MLX)
from mlx_adapters.errors import UnsupportedError
from mlx_adapters.models.architectures.table import ARCHITECTURES, with_layers
from mlx_adapters.models.supported import TABLE

__all__ = ["entry", "files", "names", "written"]


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


def written() -> dict[str, Any]:
    """The whole table."""
    versions = {name: metadata.version(name) for name in ("mlx", "mlx-lm")}
    return {
        "versions": versions,
        "files": files(),
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
    arguments = parser.parse_args()
    if arguments.write:
        TABLE.write_text(as_text(written()), encoding="utf-8")
    for name in arguments.names:
        print(name, json.dumps(entry(name), indent=1))


if __name__ == "__main__":
    main()
