"""`mlx-adapters data overlap TRAIN TEST`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_adapters.cli import complete
from mlx_adapters.cli.options import App
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import table
from mlx_adapters.errors import DataError

if TYPE_CHECKING:
    from mlx_adapters.data.overlap import Overlap

__all__ = ["app"]

app = App(no_args_is_help=True, rich_markup_mode=None, help="Look at data before training on it.")


@app.callback()
def _group() -> None:
    """Look at data before training on it."""


@app.command("overlap")
@reporting("test", "total", "seen", "near", "sampled", each=True)
def overlap_command(
    train: Annotated[str, typer.Argument(help="training data as in `train --data`, or an adapter folder")],
    test: Annotated[
        str,
        typer.Argument(
            help="test files or sets, joined by commas, as in `eval --task`", autocompletion=complete.tasks
        ),
    ],
    data_dir: Annotated[
        Path | None, typer.Option(help="folder with NAME/test.json; default: the hub")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="print N of the items found")] = 0,
) -> None:
    """Count test items whose question stands in the training data, or shares 13 words in a row with it."""
    from dataclasses import asdict

    from mlx_adapters.data.overlap import overlap

    known = _known(train)
    found = [(name, texts, overlap(known, texts)) for name, texts in _tests(test, data_dir)]

    def words() -> None:
        columns = ["test", "items", "seen", "near (13 words in a row)", "new"]
        table(columns, [_row(name, one) for name, _, one in found])
        for name, texts, one in found:
            for kind, indices in (("seen", one.seen), ("near", one.near)):
                for index in indices[:show]:
                    typer.echo(f"{name} item {index}, {kind}: {' '.join(texts[index].split())[:200]}")
        if any(one.sampled for _, _, one in found):
            typer.echo(
                "The training set is large: its 13-word hashes are a sample, near items may be missing."
            )

    report([{"test": name, **asdict(one)} for name, _, one in found], words)


def _known(train: str) -> list[str]:
    from mlx_adapters.data.overlap import rows_texts, seen_hashes
    from mlx_adapters.data.sources import load_rows

    if (Path(train) / "adapter_config.json").is_file():
        from mlx_adapters import adapter

        seen = adapter.read_meta(Path(train)).seen
        if not seen:
            raise DataError(f"{train}: this adapter does not remember what it was trained on (no seen.txt)")
        return seen
    return seen_hashes(rows_texts(load_rows(train)))


def _tests(test: str, data_dir: Path | None) -> list[tuple[str, list[str]]]:
    """(name, questions) of each test set; a file need not have answers."""
    from mlx_adapters.data.overlap import row_text, rows_texts
    from mlx_adapters.data.sources import load_rows, read_rows
    from mlx_adapters.evaluate import tasks

    found = []
    for name in (part.strip() for part in test.split(",")):
        if Path(name).is_file() and "answer" not in next(iter(read_rows(Path(name))), ("", {}))[1]:
            found.append((name, rows_texts(load_rows(name))))
        elif name:
            for task, items in tasks.load(name, data_dir=data_dir):
                rows: list[dict[str, Any]] = [{"instruction": i.instruction, "input": i.input} for i in items]
                found.append((task.name, [row_text(row, "instruction") for row in rows]))
    return found


def _row(name: str, found: "Overlap") -> list[str]:
    new = found.total - len(found.seen) - len(found.near)
    return [name, *(str(n) for n in (found.total, len(found.seen), len(found.near), new))]
