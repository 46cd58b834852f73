"""Which tests are `-m unit` (fast, no torch) and which are `-m parity` (compared with another program).

Both are read from the source, so that a run of `-m unit` imports no module but its own: others import torch.
"""

import ast
from functools import cache
from pathlib import Path

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent
# Modules whose tests take a second of CPU time or less; those of their tests that need torch are left out.
# Together they took 45 s of CPU time when this list was made, on one core of a busy machine.
FAST = (
    "adapter/test_combine.py",
    "cli/test_complete.py",
    "cli/test_screen.py",
    "cpu/test_exponential.py",
    "cpu/test_quantized.py",
    "cpu/test_threads.py",
    "data/test_data.py",
    "data/test_long_rows.py",
    "data/test_overlap.py",
    "data/test_sources.py",
    "evaluate/test_answers.py",
    "evaluate/test_compare.py",
    "evaluate/test_eval_resume.py",
    "evaluate/test_readings.py",
    "evaluate/test_tasks.py",
    "repository/test_front_door.py",
    "repository/test_layout.py",
    "train/test_checkpoint.py",
    "train/test_loss.py",
    "train/test_packing.py",
    "train/test_run_ends.py",
    "train/test_shared_prefix.py",
    "train/test_train.py",
)
# The programs that we compare with, our modules that call them, and the variables that name other Pythons.
REFERENCES = ("torch", "transformers", "peft", "lm_eval")
REFERENCES += tuple(f"mlx_adapters.convert.{name}" for name in ("against_torch", "load_adapter", "verify"))
ENVIRONMENTS = ("MLX_ADAPTERS_HUB_PYTHON", "MLX_ADAPTERS_T451_PYTHON")
_INSIDE = "an import inside a function"


def is_parity(file: Path, test: str) -> bool:
    """Whether a test ("f" or "Class.f") calls another program for more than `tiny.make_tiny`."""
    return test in reaching(file, makers=False)


def is_fast(file: Path) -> bool:
    """Whether the module is one of FAST."""
    return str(file.relative_to(TESTS)) in FAST


def is_unit(file: Path, test: str) -> bool:
    """Whether the module is fast and the test needs no torch, not even for `tiny.make_tiny`."""
    return is_fast(file) and test not in reaching(file, makers=True)


@cache
def reaching(file: Path, *, makers: bool) -> frozenset[str]:
    """The names of a module ("f", "Class", "Class.f", a constant) whose code leads to one of REFERENCES.

    With `makers`, a tiny model that transformers saves leads there too.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = {_INSIDE} | {name for node in tree.body for name in _imported(node, makers)}
    if makers and file.name.startswith("test_"):
        for fixtures in {TESTS / "conftest.py", file.parent / "conftest.py"}:
            found |= reaching(fixtures, makers=True) if fixtures.exists() else set()
    uses = {name: _used(node, makers) for name, node in _definitions(tree)}
    while more := {name for name, used in uses.items() if name not in found and found & used}:
        found |= more
    return frozenset(found)


def _definitions(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    made: list[tuple[str, ast.AST]] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            made += [(f"{node.name}.{part.name}", part) for part in node.body if hasattr(part, "name")]
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.append((node.name, node))
        elif isinstance(node, ast.Assign):
            made += [(name.id, node) for name in node.targets if isinstance(name, ast.Name)]
    return made


def _used(tree: ast.AST, makers: bool) -> set[str]:
    """The names that a definition uses, its arguments, which are fixtures, among them."""
    nodes = [*ast.walk(tree)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    constants = {node.value for node in nodes if isinstance(node, ast.Constant)}
    inside = any(_imported(node, makers) for node in nodes) or not constants.isdisjoint(ENVIRONMENTS)
    return names | ({_INSIDE} if inside else set())


def _imported(node: ast.AST, makers: bool) -> set[str]:
    """The names that an import binds to a reference, or to what leads to one in another module of support."""
    if isinstance(node, ast.Import):
        return {(part.asname or part.name).partition(".")[0] for part in node.names if _foreign(part.name)}
    if isinstance(node, ast.Assign) and "importorskip" in (call := ast.unparse(node.value)):
        return {ast.unparse(name) for name in node.targets if _foreign(call.split("'")[1])}
    if not isinstance(node, ast.ImportFrom) or node.module is None:
        return set()
    names = {part.name: part.asname or part.name for part in node.names}
    file = SUPPORT / f"{node.module}.py"
    if file.exists() and (makers or file.stem != "tiny"):
        return {local for name, local in names.items() if name in reaching(file, makers=makers)}
    return {local for name, local in names.items() if _foreign(f"{node.module}.{name}")}


def _foreign(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in REFERENCES)
