"""The package as it is installed: complete, typed, quick to start, and without stray top-level names."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_package_list_is_complete() -> None:
    folders = {"mlx_adapters", "mlx_adapters.cli", "mlx_adapters.convert"}
    folders |= {
        f"mlx_adapters.{folder.name}"
        for folder in (ROOT / "mlx_adapters").iterdir()
        if not folder.is_symlink() and (folder / "__init__.py").exists()
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders


def test_a_wheel_holds_every_module_and_nothing_at_the_top(tmp_path: Path) -> None:
    import zipfile

    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mlx_adapters"}
    sources = [
        *(ROOT / "mlx_adapters").glob("*.py"),
        *(ROOT / "convert").glob("*.py"),
        *(ROOT / "cli").glob("*.py"),
    ]
    for source in sources:
        relative = source.relative_to(ROOT)
        prefix = "" if relative.parts[0] == "mlx_adapters" else "mlx_adapters/"
        assert f"{prefix}{relative}" in names
    assert "mlx_adapters/py.typed" in names


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from mlx_adapters.cli.app import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "heavy = ('mlx.core', 'transformers', 'torch', 'datasets', 'matplotlib'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_readme_holds_the_two_commands_and_ci_runs_the_second() -> None:
    readme = (ROOT / "README.md").read_text()
    assert ".venv/bin/mlx-adapters quickstart" in readme
    commands = [
        line for line in readme.splitlines() if line.startswith("python3 -m venv") and "pytest" in line
    ]
    assert len(commands) == 1
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
