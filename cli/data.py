"""`mlx-adapters data overlap TRAIN TEST`, `data show SOURCE` and `data stats SOURCE`."""

from dataclasses import asdict, fields
from typing import Annotated, Any

import typer

from mlx_adapters.cli import complete
from mlx_adapters.cli.options import App, DataDir, arg, fields_as_options, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.data.showing import Preview, Statistics
from mlx_adapters.fields import merged
from mlx_adapters.screen import ended, picture, table

_TEST = "test files or sets, joined by commas, as in `eval --task`"
app = App(no_args_is_help=True, rich_markup_mode=None, help="Look at data before training on it.")


@app.callback()
def _group() -> None:
    """Look at data before training on it."""


Source = Annotated[str, arg("training data as in `train --data`")]
Tokenizer = Annotated[str, opt("model folder or hub id, whose tokenizer and chat template are used")]


@app.command("show")
@reporting("row", "pieces", "tokens", "supervised", each=True)
@fields_as_options(Preview)
def show_command(source: Source, model: Tokenizer, **given: Any) -> None:
    """Print rows as they will be trained: what is learned in colour, special tokens as text."""
    from mlx_adapters.data import preview

    found = preview.show_rows(source, model, **merged({}, given))
    report([asdict(one) for one in found], lambda: picture(found))


@app.command("stats")
@reporting(*(field.name for field in fields(Statistics)))
@fields_as_options(Preview)
def stats_command(source: Source, model: Tokenizer, **given: Any) -> None:
    """Count tokens, lengths, repeated rows and empty answers, and suggest a max length."""
    from mlx_adapters.data import preview
    from mlx_adapters.next_steps import after_statistics

    found = preview.row_statistics(source, model, **merged({}, given))
    text = "\n".join(preview.described(found))
    report(asdict(found), lambda: ended(text, after_statistics(source, model)))


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
