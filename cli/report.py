"""What a command reports: words for people or, with `--json`, one JSON document on stdout.

A command decorated with `reporting` has the option, and ends in one call of `report`. Progress and notes go
to stderr either way; an error is one line there and leaves stdout empty.
"""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from mlx_adapters.files.documents import to_json

_as_json = False


def reporting(*fields: str, each: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `--json`, whose help names the document's fields, or with `each` those of its list's
    entries; a test holds the two together."""
    kind = "list, each entry with" if each else "document"
    option = typer.Option("--json", help=f"print one JSON {kind}: {', '.join(fields)}")
    parameter = inspect.Parameter(
        "json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(*, json: bool = False, **given: Any) -> None:
            global _as_json
            _as_json = json
            try:
                command(**given)
            finally:
                _as_json = False

        own = inspect.signature(command)
        hints = typing.get_type_hints(command, include_extras=True)
        parameters = [*own.parameters.values(), parameter]
        wrapper.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = hints | {"json": parameter.annotation}
        return wrapper

    return decorate


def report(document: Any, words: Callable[[], None], *, passed: bool = True) -> None:
    """Print the result: `document` as JSON where the user asked for it, otherwise what `words` prints.

    Ends with exit code 1 where something that was compared has not `passed`.
    """
    if _as_json:
        typer.echo(to_json(document))
    else:
        words()
    if not passed:
        raise typer.Exit(1)


def live(text: str) -> None:
    """Text that people read as it comes; with `--json` it waits for the document."""
    if not _as_json:
        typer.echo(text, nl=False)
