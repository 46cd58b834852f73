"""Shell completion: installed for each shell, the known values, and MLX stays out."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import commands

from mlx_adapters import methods
from mlx_adapters.adapter import combine
from mlx_adapters.convert import checkpoint, exchange, fuse
from mlx_adapters.data.showing import LOSS_ON
from mlx_adapters.data.templates import TEMPLATES
from mlx_adapters.evaluate import config as evaluation
from mlx_adapters.evaluate import tasks
from mlx_adapters.models import load as model
from mlx_adapters.train import config, loggers

COMMAND = [sys.executable, "-m", "mlx_adapters.cli.app"]
TASKS = [*tasks.names(), *tasks.GROUPS]
# name of an option or argument -> what the library takes there
KNOWN = {
    "method": methods.names(),
    "task": TASKS,
    "template": TEMPLATES,
    "loss_on": LOSS_ON,
    "optimizer": config.OPTIMIZER_NAMES,
    "schedule": config.SCHEDULES,
    "on_bad_step": config.BAD_STEP,
    "dtype": model.DTYPES,
    "log": loggers.LOGGERS,
    "format": exchange.FORMATS,
    "mode": checkpoint.MODES,
    "recipe": checkpoint.RECIPES,
    "to": fuse.TARGETS,
    "how": combine.COMBINATIONS,
    "decoding": evaluation.DECODINGS,
    "choices": evaluation.CHOICES,
}


def typed(shell: str, line: str) -> dict[str, str]:
    """The environment in which a shell asks what may follow `line`."""
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)} if shell == "bash" else {}
    return {
        **os.environ,
        "_MLX_ADAPTERS_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        **asked,
    }


def asked(shell: str, line: str) -> str:
    return subprocess.run(COMMAND, env=typed(shell, line), capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "expected", "others"),
    [
        ("mlx-adapters qui", ["quickstart"], ["train"]),
        ("mlx-adapters data ", ["overlap", "show", "stats"], ["quickstart"]),
        ("mlx-adapters train --method lo", ["lora", "loreft"], ["dora"]),
        ("mlx-adapters eval m --task gsm8k,SV", ["gsm8k,SVAMP"], ["boolq"]),
        ("mlx-adapters train --grad", ["--gradient-checkpointing"], ["--lr"]),
    ],
)
def test_what_each_shell_is_told(shell: str, line: str, expected: list[str], others: list[str]) -> None:
    said = asked(shell, line)
    quoted = '"{}"' if shell == "zsh" else "{}"
    assert [word for word in expected if quoted.format(word) not in said] == []
    assert [word for word in others if word in said] == []


@pytest.mark.parametrize(
    ("shell", "expected"), [("zsh", r"[default\\: 0.0003]"), ("fish", "[default: 0.0003]")]
)
def test_descriptions_keep_what_stands_in_brackets(shell: str, expected: str) -> None:
    assert expected in asked(shell, "mlx-adapters train --l")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_it_installs(shell: str, tmp_path: Path) -> None:
    env = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = subprocess.run([*COMMAND, "--show-completion", shell], env=env, capture_output=True, text=True)
    assert "_MLX_ADAPTERS_COMPLETE=complete_" + shell in shown.stdout, shown.stderr
    done = subprocess.run([*COMMAND, "--install-completion", shell], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = [file.read_text() for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".so"]
    assert any("_MLX_ADAPTERS_COMPLETE=complete_" + shell in text for text in texts)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_with_what_was_shown(tmp_path: Path) -> None:
    """The script in a real shell, with the command under its own name."""
    (tmp_path / "mlx-adapters").write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} "$@"\n')
    (tmp_path / "mlx-adapters").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    env["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    script = (
        'eval "$(mlx-adapters --show-completion bash)"; COMP_WORDS=(mlx-adapters export a b --format ml); '
        'COMP_CWORD=5; _mlx_adapters_completion mlx-adapters; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["mlx-lm"]


def test_every_option_with_known_values_completes_them() -> None:
    found: dict[str, set[tuple[str, ...]]] = {}
    for _, command in commands():
        context = typer.Context(command)
        for parameter in command.params:
            if parameter.name in KNOWN:
                values = tuple(item.value for item in parameter.shell_complete(context, ""))
                found.setdefault(parameter.name, set()).add(values)
    assert found == {name: {tuple(values)} for name, values in KNOWN.items()}


def test_arguments_complete_too() -> None:
    def values(name: str, argument: str) -> list[str]:
        command: Any = dict(commands())[name]
        (parameter,) = [p for p in command.params if p.name == argument]
        return [item.value for item in parameter.shell_complete(typer.Context(command), "")]

    assert values("methods", "name") == methods.names()
    assert values("data overlap", "test") == TASKS


def test_completion_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom mlx_adapters.cli.app import main\n"
        "try:\n    main()\nfinally:\n    print('loaded', *sys.modules, file=sys.stderr)\n"
    )
    for line in ("mlx-adapters train --method ", "mlx-adapters eval m --task ", "mlx-adapters train --"):
        done = subprocess.run(
            [sys.executable, "-c", code], env=typed("bash", line), capture_output=True, text=True
        )
        assert len(done.stdout.split()) > 5, done.stderr
        heavy = {
            "rich.console",
            "mlx.core",
            "mlx_lm",
            "transformers",
            "datasets",
            "matplotlib",
            "torch",
            "numpy",
        }
        assert heavy.isdisjoint(done.stderr.split("loaded ")[1].split())
