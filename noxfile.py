"""The tasks of development, run in the current environment: `nox -l` lists them, `nox -s lint` runs one."""

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "tests"]


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff and mypy."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The default test run: everything but what takes minutes. `nox -s tests -- -k lora` runs some."""
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def unit(session: nox.Session) -> None:
    """The fast tests, under a minute, without torch."""
    session.run("python", "-m", "pytest", "-m", "unit", *session.posargs)


@nox.session
def parity(session: nox.Session) -> None:
    """The tests that compare with torch, transformers, PEFT, lm-eval or AdapterHub."""
    session.run("python", "-m", "pytest", "-m", "parity", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """The tests that take minutes, one at a time."""
    session.run("python", "-m", "pytest", "-m", "slow", "-n", "0", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Write the reference anew and build the site into site/."""
    session.run("python", "docs/reference.py")
    session.run("mkdocs", "build", "--strict")


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmark of training against PyTorch and mlx-lm; see examples/benchmarks/ for the others."""
    session.run("python", "examples/benchmarks/training.py", *session.posargs)
