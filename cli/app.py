"""The `mlx-adapters` command: one file per subcommand, and one place that turns errors into exit codes.

0 done, 1 a comparison failed (`--verify`), 2 the user's to mend (one line says what), 130 interrupted.
Nothing heavy is imported here: `mlx-adapters --help` must answer at once.
"""

import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mlx_adapters import __version__, signals
from mlx_adapters.cli import data
from mlx_adapters.cli.options import App
from mlx_adapters.cpu import processes
from mlx_adapters.errors import AdaptersError
from mlx_adapters.files.streams import deaf
from mlx_adapters.screen import complain, say

_LONGEST = 2000  # characters of an error
# In the order of the help.
_COMMANDS = """quickstart convert plan train eval harness compare study export push import fuse generate chat
serve combine info methods models doctor"""
# Commands that compute with MLX alone, also where torch is installed.
_WITHOUT_TORCH = {
    *("train", "eval", "study", "generate", "chat", "serve"),
    *("plan", "info", "import", "combine", "models", "push"),
}


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AdaptersError as error:
            _fail(" ".join(str(error).split()), 2)
        except signals.Stopped:
            raise typer.Exit(130) from None
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except SystemExit as error:  # typer ends in other ways: this comes from a library
            _fail(f"a library ended the program ({error.code})", 2)
        except OSError as error:
            if deaf(sys.stdout) and isinstance(error, BrokenPipeError):
                raise typer.Exit(0) from None  # the reader, such as head, has seen enough of the result
            if error.filename is None and error.errno is None:
                raise
            place = f"{error.filename}: " if error.filename else ""
            _fail(f"{place}{error.strerror or error}", 2)


def _fail(message: str, code: int) -> None:
    if len(message) > _LONGEST:  # a file can hold names of any length
        message = message[:_LONGEST] + " ..."
    complain(message)
    raise typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mlx-adapters {__version__}")
        raise typer.Exit


app = App(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # markup would swallow text in brackets: [default: lora]
    help="Train adapters for language models on Apple MLX or a plain CPU; hand them to PyTorch unchanged.",
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None: ...


for _name in _COMMANDS.split():
    _module = import_module(f"mlx_adapters.cli.{'import_adapter' if _name == 'import' else _name}")
    app.command(_name)(_module.command)
app.add_typer(data.app, name="data")


def main() -> None:
    """The console script."""
    processes.follow()
    # transformers' and the hub's progress bars and hints would interleave with ours
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torch's OpenMP threads spin while they wait and starve MLX's: --verify was ten times slower on two cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "_MLX_ADAPTERS_COMPLETE" in os.environ:
        # Typer would read the descriptions as Rich's markup: slow, and [default: lora] would vanish
        sys.modules["rich"] = None  # type: ignore[assignment]
    if not {"--verify", "--help"} & set(sys.argv) and sys.argv[1:2] and sys.argv[1] in _WITHOUT_TORCH:
        # transformers, read for its tokenizers, imports torch wherever that is installed: three seconds for
        # nothing. None in its place says that there is none; a process that has it already keeps it.
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    signals.listen(say)
    app(prog_name="mlx-adapters")


if __name__ == "__main__":
    main()
