"""Imports go down only, wherever in a file they stand: what a module needs lies below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The packages and modules of mlx_adapters, from the ground up; those of one floor may import each other.
FLOORS = (
    ("errors", "fields", "notebook", "rebind", "signals", "units"),
    ("files",),
    ("device",),
    ("cpu",),
    ("models",),
    ("methods",),
    ("adapter",),
    ("data", "generate", "train", "evaluate", "screen"),
    ("convert",),
    ("study", "serve", "doctor", "next_steps"),
    ("api",),
    ("cli",),
)
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}
# What goes up today, none: (importing file, imported module) -> why.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def sources() -> list[Path]:
    files = [file for part in ("mlx_adapters", "convert", "cli") for file in (ROOT / part).rglob("*.py")]
    return [file for file in files if not any(parent.is_symlink() for parent in file.parents)]


def name(file: Path) -> str:
    """The path of a file below mlx_adapters, where `convert` and `cli` are installed."""
    return file.relative_to(ROOT).as_posix().removeprefix("mlx_adapters/")


def imported(text: str) -> Iterator[str]:
    """The modules of this package that a source text imports, as paths below mlx_adapters."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "mlx_adapters":
            yield from (alias.name for alias in node.names if alias.name in FLOOR)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_adapters."):
            yield str(node.module).removeprefix("mlx_adapters.")
        elif isinstance(node, ast.Import):
            found = (alias.name for alias in node.names if alias.name.startswith("mlx_adapters."))
            yield from (module.removeprefix("mlx_adapters.") for module in found)


def upward() -> set[tuple[str, str]]:
    found = set()
    for file in sources():
        own = name(file)
        if (floor := FLOOR.get(own.partition("/")[0].removesuffix(".py"))) is None:
            continue  # the front door
        for module in imported(file.read_text(encoding="utf-8")):
            if FLOOR[module.partition(".")[0]] > floor:
                found.add((own, module))
    return found


def test_imports_go_down() -> None:
    assert upward() - EXCEPTIONS.keys() == set()


def test_every_exception_is_still_needed() -> None:
    assert EXCEPTIONS.keys() - upward() == set()


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("from mlx_adapters import device, __version__", ["device"]),
        ("def f():\n    from mlx_adapters.cli.app import main", ["cli.app"]),
        ("import mlx_adapters.models.load, os", ["models.load"]),
    ],
)
def test_an_import_is_seen(text: str, modules: list[str]) -> None:
    assert list(imported(text)) == modules


def test_every_part_has_a_floor() -> None:
    parts = {name(file).partition("/")[0].removesuffix(".py") for file in sources()} - {"__init__"}
    assert parts <= FLOOR.keys()
