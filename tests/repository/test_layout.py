"""The tests themselves: where they stand, what they import, and what is told of them."""

import ast
import re
from pathlib import Path

from subsets import FAST, is_parity, is_unit

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
MODULES = sorted(TESTS.rglob("test_*.py"))


def imported(file: Path) -> set[str]:
    """The modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_no_module_imports_a_test_module() -> None:
    names = {file.stem for file in MODULES}
    assert len(names) == len(MODULES) > 60, "pytest knows a module by its name"
    for file in TESTS.rglob("*.py"):
        assert names.isdisjoint(imported(file)), file


def test_the_folders_are_those_of_the_package() -> None:
    package = {file.parent.name for file in (ROOT / "mlx_adapters").glob("*/__init__.py")}
    assert {"cli", "convert", "train"} <= package
    assert {file.parent.relative_to(TESTS).as_posix() for file in MODULES} == package | {
        "repository",
        "robustness",
    }


def test_what_is_shared_is_short() -> None:
    for file in (TESTS / "support").glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file


def test_the_table_of_faults_names_tests_that_exist() -> None:
    rows = [
        line for line in (TESTS / "README.md").read_text(encoding="utf-8").splitlines() if ".py::" in line
    ]
    assert len(rows) >= 45
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row)
        assert len(named) == row.count("::")
        for file, name in named:
            assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), (file, name)


def test_the_subsets_are_told_from_the_source() -> None:
    assert [file for file in FAST if not (TESTS / file).exists()] == []
    training, reading = TESTS / "train" / "test_torch_training.py", TESTS / "evaluate" / "test_readings.py"
    tests = re.findall(r"^def (test_\w+)", training.read_text(encoding="utf-8"), re.MULTILINE)
    assert tests
    assert all(is_parity(training, test) for test in tests)  # torch at the top, and from support
    beam = TESTS / "generate" / "test_beam.py"  # torch inside a function of its own
    assert is_parity(beam, "test_forty_ragged_prompts_equal_transformers")
    assert not is_parity(beam, "test_four_beams_find_more_likely_answers_than_one")
    assert is_unit(reading, "test_a_label_is_read_as_it_is_stated")
    assert not is_unit(
        TESTS / "data" / "test_overlap.py", "test_an_adapter_is_compared_by_what_it_remembers"
    )  # by make_tiny
