"""The commands of the program, and how to call one."""

from collections.abc import Iterator
from typing import Any

import typer
from typer.testing import CliRunner, Result

from mlx_adapters.cli.app import app


def commands(group: Any = None, before: str = "") -> Iterator[tuple[str, Any]]:
    """("data overlap", its command), and so on."""
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield before + name, command


def cli(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result
