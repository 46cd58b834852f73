"""Write docs/reference/commands.md from the commands' own help: python docs/commands.py"""

from pathlib import Path

import click
import typer

from mlx_adapters.cli.app import app

PAGE = Path(__file__).parent / "reference" / "commands.md"
WIDTH = 96


def text() -> str:
    """The page: a section for each command, with its help as the terminal shows it."""
    root = typer.main.get_command(app)
    parts = ["# Commands\n\nWritten by `docs/commands.py` from `--help`.\n"]
    for name, command in _commands(root, ""):
        context = click.Context(command, info_name=f"mlx-adapters {name}", terminal_width=WIDTH)
        parts.append(f"## {name}\n\n```text\n{command.get_help(context).strip()}\n```\n")
    return "\n".join(parts)


def _commands(group: click.Command, prefix: str) -> list[tuple[str, click.Command]]:
    found = []
    for name, command in getattr(group, "commands", {}).items():
        if hasattr(command, "commands"):
            found += _commands(command, f"{prefix}{name} ")
        else:
            found.append((prefix + name, command))
    return found


if __name__ == "__main__":
    PAGE.write_text(text())
