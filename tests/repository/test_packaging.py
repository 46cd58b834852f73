"""The package as it is installed: complete, typed, quick to start, and without stray top-level names."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from mlx_adapters import __version__

ROOT = Path(__file__).parents[2]
# What belongs to a release, and lies in the repository.
PARTS = ("mlx_adapters", "convert", "cli", "tests", "examples", "docs")
FILES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "CITATION.cff",
    "LICENSE",
    "pyproject.toml",
    "mkdocs.yml",
    ".ci/run",
)


def sources(part: str) -> set[str]:
    """The files of a part, by their paths in the repository."""
    folder = ROOT / part
    links = {link for link in folder.iterdir() if link.is_symlink()}
    return {
        str(file.relative_to(ROOT))
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and links.isdisjoint(file.parents)
    }


def test_a_wheel_holds_every_module_and_nothing_at_the_top(tmp_path: Path) -> None:
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
    assert wheel.name.endswith("-py3-none-any.whl")  # macOS and Linux, on any processor
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    inside = {f"mlx_adapters/{name}" for part in ("convert", "cli") for name in sources(part)}
    assert names == sources("mlx_adapters") | inside
    assert "mlx_adapters/py.typed" in names


@pytest.mark.slow
def test_two_builds_are_the_same_bytes_and_hold_the_repository(tmp_path: Path) -> None:
    """From two folders, with other times and rights of the files, and with what work leaves behind."""
    pytest.importorskip("build.env", reason="pip install build")
    made = []
    for number in (1, 2):
        copy = tmp_path / f"copy{number}"
        for part in PARTS:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, copy / part, symlinks=True, ignore=ignored)
        for name in (*FILES, ".gitignore"):
            (copy / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
        for file in (file for file in copy.rglob("*.py") if not file.is_symlink()):
            os.utime(file, (1e9 * number, 1e9 * number))
            file.chmod(0o600 if number == 1 else 0o644)
        for junk in ("cli/__pycache__/app.pyc", "dist/old.whl", ".venv/x.py", "notes.txt"):
            (copy / junk).parent.mkdir(exist_ok=True)
            (copy / junk).write_text(str(number))
        out = tmp_path / f"out{number}"
        command = [sys.executable, "-m", "build", "--outdir", str(out), str(copy)]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
        subprocess.run(command, check=True, capture_output=True, env=environment, cwd=tmp_path)
        made.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.iterdir()})
    assert made[0] == made[1]
    assert len(made[0]) == 2
    (archive,) = (tmp_path / "out1").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    repository = {name for part in PARTS for name in sources(part)} | set(FILES)
    assert names - {".gitignore", "PKG-INFO"} == repository


def test_the_citation_is_of_this_version() -> None:
    about = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert about["version"] == __version__
    assert {"cff-version", "message", "title", "authors", "license"} <= set(about)


def test_the_readme_holds_the_two_commands_and_ci_runs_the_second() -> None:
    """Each is one line of at most 100 columns; .ci/run takes the second out of the README as it is."""
    readme = (ROOT / "README.md").read_text()
    commands = [line for line in readme.splitlines() if line.startswith("python3 -m venv")]
    first, second = commands
    assert first.endswith(".venv/bin/mlx-adapters quickstart")
    assert second.endswith(".venv/bin/python -m pytest")
    assert max(map(len, commands)) <= 100
    find = next(
        line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("command=")
    )
    taken = subprocess.check_output(["bash", "-c", f'{find}; echo "$command"'], text=True, cwd=ROOT)
    assert taken.splitlines() == [second]


def test_the_tests_see_nothing_of_the_users_environment() -> None:
    """OPENBLAS_CORETYPE made `doctor`, and with it the test of the documentation, fail."""
    hostile = {"OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_NUM_THREADS": "7", "COLUMNS": "20", "NO_COLOR": "1"}
    hostile |= {"HF_HOME": "/nowhere", "HF_TOKEN": "secret", "XDG_CACHE_HOME": "/nowhere", "LC_ALL": "C"}
    hostile |= {"MLX_ADAPTERS_BLAS": "off", "MLX_RANK": "1", "PYTHONSAFEPATH": "1", "MKL_NUM_THREADS": "3"}
    paths = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]
    code = "import json, conftest, os; print(json.dumps(dict(os.environ)))"
    clean, seen = (
        json.loads(
            subprocess.check_output(
                [
                    sys.executable,
                    "-c",
                    f"import sys; sys.path[:0] = {paths}; {code}",
                ],
                env=os.environ | more,
            )
        )
        for more in ({}, hostile)
    )
    assert seen == clean
