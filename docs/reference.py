"""Write reference/commands.md and reference/methods.md from the command line and the methods themselves.

    python docs/reference.py

A test fails while a page is another than what would be written.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

PAGES = Path(__file__).parent / "reference"
NOTE = "<!-- made by docs/reference.py: change the program, then run it again -->\n\n"


def commands() -> str:
    """The page of every command with its arguments and options."""
    from mlx_adapters.cli.app import app

    root = get_command(app)
    page = [
        "# Commands\n",
        f"{NOTE}`mlx-adapters COMMAND --help` prints the same. Errors are one line on stderr.\n",
    ]
    page.append("Exit codes: 0 done; 1 a comparison failed; 2 yours to mend; 130 interrupted.\n")
    for name, command in _leaves(root, []):
        page += [f"## {name}\n", _text(command.help or ""), ""]
        page += [f"```text\n{_usage(name, command)}\n```\n"]
        rows = [_row(one) for one in command.params if not getattr(one, "hidden", False)]
        rows = [row for row in rows if row[0] != "`--help`"]
        page += [_table(("", "meaning", "default"), rows), ""]
    return "\n".join(page).rstrip() + "\n"


def methods() -> str:
    """The page of every method with its fields."""
    from mlx_adapters.methods import about as about_one
    from mlx_adapters.methods import names

    page = ["# Methods\n", f"{NOTE}`mlx-adapters methods NAME` prints the same.\n"]
    for about in map(about_one, names()):
        first, *rest = about["doc"].split("\n\n")
        page += [f"## {about['method']}\n", _linked(" ".join(first.split())), ""]
        page += ["\n\n".join(_paragraph(one) for one in rest), ""]
        facts = [
            f"stands on {about['stands_on']}",
            "mergeable" if about["mergeable"] else "not mergeable",
            "in PEFT" if about["in_peft"] else "not in PEFT",
        ]
        page += [f"{'; '.join(facts).capitalize().replace('peft', 'PEFT')}.\n"]
        rows = [(f"`{f['name']}`", f["help"], _default(f["default"])) for f in about["fields"]]
        page += [_table(("`--set`", "meaning", "default"), rows), ""]
    return "\n".join(page).rstrip() + "\n"


def _leaves(command: Any, path: list[str]) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield " ".join(path), command
        return
    for name, one in command.commands.items():
        yield from _leaves(one, [*path, name])


def _usage(name: str, command: Any) -> str:
    words = [_argument(one) for one in command.params if one.param_type_name == "argument"]
    needed = [
        f"{one.opts[0]} ..." for one in command.params if one.param_type_name != "argument" and one.required
    ]
    return " ".join(["mlx-adapters", name, *words, *needed, "[options]"])


def _argument(one: Any) -> str:
    name = str(one.name).upper() + (" ..." if one.nargs == -1 else "")
    return name if one.required else f"[{name}]"


def _row(one: Any) -> tuple[str, str, str]:
    if one.param_type_name == "argument":
        needed = "" if one.required else " (may be left out)"
        return f"`{str(one.name).upper()}`", f"{one.help or ''}{needed}", ""
    names = ", ".join(f"`{name}`" for name in [*one.opts, *one.secondary_opts])
    meaning, found = one.help or "", re.search(r" ?\[default: (.+?)\]$", one.help or "")
    if found:  # of an option that is empty until the program has looked at others
        return names, meaning[: found.start()], _code(found[1])
    if one.is_flag and not one.default:
        return names, meaning, ""
    return names, meaning, "must be given" if one.required else _default(one.default)


def _default(value: Any) -> str:
    return "" if value is None or value in ("", [], ()) or callable(value) else _code(str(value))


def _code(text: str) -> str:
    return f"`{text}`" if re.fullmatch(r"[\w.*,+:-]+", text) else text


def _text(text: str) -> str:
    return _escaped("\n\n".join(" ".join(part.split()) for part in text.split("\n\n")))


def _paragraph(part: str) -> str:
    """Formulas are indented in the docstrings: they stay as they are."""
    return part.strip("\n") if part.startswith(" ") else _linked(part)


def _linked(text: str) -> str:
    return re.sub(r"(https://[^\s,;)]*[^\s,;).])", r"<\1>", text)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _table(head: tuple[str, ...], rows: list[tuple[str, str, str]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(map(_escaped, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    (PAGES / "commands.md").write_text(commands(), encoding="utf-8")
    (PAGES / "methods.md").write_text(methods(), encoding="utf-8")
