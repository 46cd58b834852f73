"""Command-line options made from the dataclass that declares them: each option is written once."""

import dataclasses
import inspect
import typing
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from mlx_adapters.cli.complete import DTYPES, FIELDS, MODES, Complete, among, methods, templates
from mlx_adapters.cli.spelling import fields_of_method, spelled
from mlx_adapters.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])
N = TypeVar("N", int, float)


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = {name: option for option in self.params for name in (*option.opts, *option.secondary_opts)}
        self.asked = args if "--set" in options else []
        args = spelled(args, options)
        _, _, given = self.make_parser(ctx).parse_args(list(args))
        for option, times in Counter(given).items():
            # a list takes all of them, and a flag without a negation says the same again
            several = getattr(option, "multiple", False) or (
                getattr(option, "is_flag", False) and not option.secondary_opts
            )
            if times > 1 and not several:
                ctx.fail(f"{option.opts[0]} is given {times} times, and takes one value: leave one of them")
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """In the help of a command with --set: the method's fields."""
        if self.asked:
            method, rows = fields_of_method(self.asked)
            with formatter.section(f"Fields of {method} (--method NAME --help shows those of another)"):
                formatter.write_dl(rows)


class App(typer.Typer):
    """A Typer whose commands refuse an option given twice: Click would silently take the last."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[F], F]:
        """Typer's own, for commands of that kind."""
        return super().command(name, cls=_Command, **options)


def arg(help: str, *, values: Complete | None = None) -> Any:
    """An argument, in `Annotated`: its help, and the values that the shell completes."""
    return typer.Argument(help=help, autocompletion=values)


def opt(help: str, *names: str, values: Iterable[str] | Complete = (), **limits: Any) -> Any:
    """An option, in `Annotated`: its help, names that are not the parameter's, the values that the shell
    completes, and `min` and `max`."""
    completed = values if callable(values) else among(values) if values else None
    return typer.Option(*names, help=help, autocompletion=completed, **limits)


# Arguments and options that several commands have.
Model = Annotated[str, arg("model folder or hub id")]
Adapter = Annotated[Path, arg("adapter folder or hub id, OWNER/NAME[@REVISION]")]
NewFolder = Annotated[Path, arg("new folder to write")]
AdapterFolder = Annotated[Path | None, opt("adapter folder or hub id; without it the base model")]
Adapters = Annotated[list[str] | None, opt("NAME=FOLDER, or a folder or hub id that names it; may repeat")]
Base = Annotated[str | None, opt("hub id of the base for PyTorch users [default: the one it was named by]")]
Template = Annotated[
    str | None, opt("prompt template of all, or a FILE.jinja [default: each its own]", values=templates)
]
ChatTemplateKwargs = Annotated[str | None, opt("""chat template variables: '{"enable_thinking": false}'""")]
DataDir = Annotated[Path | None, opt("folder with NAME/test.json; default: the hub")]
BatchSize = Annotated[
    int | None, opt("rows computed together [default: what memory allows, up to 64]", min=1)
]
Dtype = Annotated[str | None, opt("float32, float16 or bfloat16 [default: the source's]", values=DTYPES)]
METHOD = opt("see `mlx-adapters methods`", values=methods)
Settings = Annotated[
    list[str] | None,
    opt("fields of the method, rank=16,alpha=32 say; or each as an option: --rank 16", "--set"),
]
Mode = Annotated[str, opt("quantization: affine, mxfp4, mxfp8 or nvfp4", values=MODES)]


def fields_as_options(config_class: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Append the fields of `config_class` to a command's signature; the command gets them in `**given`,
    None where they are not set."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(config_class)
        own = inspect.signature(command)
        parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        for field in dataclasses.fields(config_class):
            default = "" if field.default is None else f" [default: {field.default}]"
            names = [f"--{name.replace('_', '-')}" for name in (field.name, *field.metadata["also"])]
            option = opt(field.metadata["help"] + default, *names, values=FIELDS.get(field.name, ()))
            kind = _plain(hints[field.name]) | None
            keyword = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None)
            parameters.append(keyword.replace(annotation=Annotated[kind, option]))
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def numbers(text: str, kind: type[N], where: str, form: str, *, least: N | None = None) -> list[N]:
    """The numbers of a text, joined by commas, none below `least`; ConfigError tells the `form` to write."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or (least is not None and min(found) < least):
        raise ConfigError(f"{where} {text!r}: write {form}")
    return found


def _plain(hint: Any) -> Any:
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    return arguments[0] if arguments else hint
