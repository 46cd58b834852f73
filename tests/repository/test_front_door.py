"""What a user meets first: the public names, how fast they come, and code that is short."""

import ast
import inspect
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx_adapters

ROOT = Path(__file__).parents[2]
PACKAGE = ("mlx_adapters", "convert", "cli")  # the last two are links inside the first
SHOWN = ("examples", "docs", "README.md")
NAMES = {  # at least
    *("load", "train", "generate", "evaluate", "compare", "export", "import_adapter", "load_adapter"),
    *("attach", "detach", "save", "convert", "fuse", "plan", "study", "combine", "LanguageModel", "Trainer"),
    *("TrainResult", "Step", "Evaluation", "Comparison", "Method", "LoRA", "DoRA", "IA3", "VeRA", "LNTuning"),
    *("Series", "Parallel", "DoubleSeqBN", "SeqBN", "ParBN", "ScaledParBN", "Prefix", "Prompt", "PTuning"),
    *("LoReFT", "Fusion", "AdaptersError", "__version__"),
}
# What shows how to extend or measure the library says more than its public names.
INSIDE = {
    "docs/reference.py": "writes the pages on commands and methods from the program itself",
    "docs/tutorials/new-architecture.md": "a row of the table of architectures",
    "docs/tutorials/new-method.md": "a method of one's own",
    "examples/02_new_method.py": "the same method",
    "examples/benchmarks/generation.py": "measures parts",
    "examples/benchmarks/hybrids.py": "measures parts",
    "examples/benchmarks/long_rows.py": "measures parts",
    "examples/benchmarks/memory.py": "measures parts",
    "examples/benchmarks/planned.py": "measures parts",
    "examples/benchmarks/training.py": "measures parts",
}


def sources(*parts: str) -> Iterator[tuple[str, str]]:
    """(path, text) of the Python in these files and folders, each cell and block of a page for itself."""
    for part in parts:
        place = ROOT / part
        for file in [place] if place.is_file() else sorted(place.rglob("*.*")):
            name = file.relative_to(ROOT).as_posix()
            if not name.startswith(("mlx_adapters/convert/", "mlx_adapters/cli/")):
                yield from ((name, text) for text in _python(file))


def _python(file: Path) -> list[str]:
    if file.suffix not in (".py", ".md", ".ipynb"):
        return []
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    if file.suffix == ".ipynb":
        cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
        return ["".join(cell["source"]) for cell in cells]
    return [text]


def imported(text: str) -> set[str]:
    """The modules and names that a text imports, as "mlx_adapters.cli.app" and "mlx_adapters.load"."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


# The public names ------------------------------------------------------------------------------------------


def test_the_public_names_are_there_and_sorted() -> None:
    assert mlx_adapters.__all__ == sorted(mlx_adapters.__all__)
    assert NAMES - set(mlx_adapters.__all__) == set()
    assert all(hasattr(mlx_adapters, name) for name in mlx_adapters.__all__)
    assert set(mlx_adapters.__all__) <= set(dir(mlx_adapters))


def test_each_has_a_docstring_that_names_its_arguments() -> None:
    public = {name: getattr(mlx_adapters, name) for name in mlx_adapters.__all__ if name != "__version__"}
    assert len(public) > 30
    for name, thing in public.items():
        text = inspect.getdoc(thing) or ""
        assert len(text.split()) > 3, name
        if inspect.isfunction(thing):
            signature = inspect.signature(thing)
            sections = {"Args:"} | (
                {"Returns:"} if signature.return_annotation not in (None, "None") else set()
            )
            assert sections <= set(text.replace("Yields:", "Returns:").split()), name
            arguments = [argument.strip("*") for argument in signature.parameters]
            assert [one for one in arguments if f"{one}:" not in text] == [], name


def test_the_import_takes_a_third_of_a_second_and_leaves_mlx_alone() -> None:
    """The processor's seconds, which other processes leave as they are; `--help` is timed in test_cli.py."""
    code = "import sys, mlx_adapters; assert 'mlx.core' not in sys.modules, [*sys.modules]"
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < 0.3


# Who imports what ------------------------------------------------------------------------------------------


def test_nothing_outside_the_command_line_imports_it() -> None:
    allowed = ("cli/", "docs/reference.py")
    found = [
        (name, module)
        for name, text in sources(*PACKAGE, *SHOWN)
        if not name.startswith(allowed)
        for module in imported(text)
        if f"{module}.".startswith("mlx_adapters.cli.")
    ]
    assert sorted(set(found)) == []


def test_examples_and_pages_use_public_names_only() -> None:
    found = [
        (name, module)
        for name, text in sources(*SHOWN)
        if name not in INSIDE
        for module in imported(text)
        if module.startswith("mlx_adapters.") and module.partition(".")[2] not in mlx_adapters.__all__
    ]
    assert sorted(set(found)) == []


# Length ----------------------------------------------------------------------------------------------------


def test_the_command_line_is_short() -> None:
    assert sum(len(text.splitlines()) for _, text in sources("cli")) <= 1700


def test_no_file_is_long() -> None:
    assert {name: n for name, text in sources(*PACKAGE) if (n := len(text.splitlines())) > 400} == {}


def test_no_function_is_long() -> None:
    found = {
        f"{name}::{node.name}": lines
        for name, text in sources(*PACKAGE)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := 1 + (node.end_lineno or 0) - node.lineno) > 60
    }
    assert found == {}
