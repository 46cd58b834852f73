"""`mlx-adapters data overlap TRAIN TEST`."""

from dataclasses import asdict
from typing import Annotated

import typer

from mlx_adapters.cli import complete
from mlx_adapters.cli.options import App, DataDir, arg, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import table

_TEST = "test files or sets, joined by commas, as in `eval --task`"
app = App(no_args_is_help=True, rich_markup_mode=None, help="Look at data before training on it.")


@app.callback()
def _group() -> None:
    """Look at data before training on it."""


@app.command("overlap")
@reporting("test", "total", "seen", "near", "sampled", each=True)
def overlap_command(
    train: Annotated[str, arg("training data as in `train --data`, or an adapter folder")],
    test: Annotated[str, arg(_TEST, values=complete.tasks)],
    data_dir: DataDir = None,
    show: Annotated[int, opt("print N of the items found", min=0)] = 0,
) -> None:
    """Count test items whose question is in the training data, or shares 13 words in a row with it."""
    from mlx_adapters.evaluate.overlaps import cells, overlaps, sentences

    found = overlaps(train, test, data_dir=data_dir)

    def words() -> None:
        table(*cells(found))
        for line in sentences(found, show):
            typer.echo(line)

    report([{"test": name, **asdict(one)} for name, _, one in found], words)
