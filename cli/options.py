"""Command-line options made from the dataclass that declares them: each option is written once."""

import dataclasses
import inspect
import typing
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from mlx_adapters.cli.complete import DTYPES, FIELDS, MODES, Complete, among, templates
from mlx_adapters.errors import ConfigError
from mlx_adapters.files import documents

if TYPE_CHECKING:
    from mlx_adapters.adapter import AdapterMeta
    from mlx_adapters.models.load import LanguageModel


F = TypeVar("F", bound=Callable[..., Any])


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(list(args))
        for option, times in Counter(given).items():
            # a list takes all of them, and a flag without a negation says the same again
            several = getattr(option, "multiple", False) or (
                getattr(option, "is_flag", False) and not option.secondary_opts
            )
            if times > 1 and not several:
                ctx.fail(f"{option.opts[0]} is given {times} times, and takes one value: leave one of them")
        return super().parse_args(ctx, args)


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
Adapter = Annotated[Path, arg("adapter folder")]
NewFolder = Annotated[Path, arg("new folder to write")]
AdapterFolder = Annotated[Path | None, opt("adapter folder; without it the base model")]
Adapters = Annotated[list[str] | None, opt("NAME=FOLDER, or a folder that gives its name; may be repeated")]
Base = Annotated[str | None, opt("hub id of the base for PyTorch users [default: the one it was named by]")]
Template = Annotated[
    str | None,
    opt(
        "prompt template [default: the adapter's, else chat if the tokenizer has one, else plain]",
        values=templates,
    ),
]
ChatTemplateKwargs = Annotated[str | None, opt("""chat template variables: '{"enable_thinking": false}'""")]
DataDir = Annotated[Path | None, opt("folder with NAME/test.json; default: the hub")]
BatchSize = Annotated[
    int | None, opt("rows computed together [default: what memory allows, up to 64]", min=1)
]
MaxTokens = Annotated[int, opt("longest answer", min=1)]
Temperature = Annotated[float, opt("0 takes the most likely token", min=0)]
Dtype = Annotated[str | None, opt("float32, float16 or bfloat16 [default: the source's]", values=DTYPES)]
Mode = Annotated[str, opt("quantization: affine, mxfp4, mxfp8 or nvfp4", values=MODES)]


def fields_as_options(
    config_class: type, **values: Iterable[str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Append the fields of `config_class` to a command's signature; the command gets them in `**given`,
    None where they are not set. `values` are what the shell completes, by field."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(config_class)
        own = inspect.signature(command)
        parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        for field in dataclasses.fields(config_class):
            default = "" if field.default is None else f" [default: {field.default}]"
            kind = _plain(hints[field.name])
            option = typer.Option(
                f"--{field.name.replace('_', '-')}",
                help=field.metadata["help"] + default,
                autocompletion=among(values[field.name]) if field.name in values else FIELDS.get(field.name),
            )
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[kind | None, option],
                )
            )
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def read_yaml(file: Path | None, known: set[str]) -> dict[str, Any]:
    """A run file as a flat mapping; ConfigError for anything else, and for unknown keys."""
    content = {} if file is None else documents.read_yaml(file)
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must be a mapping of option names to values")
    if strange := sorted(set(map(str, content)) - known):
        raise ConfigError(f"{file}: unknown keys {', '.join(strange)}. Known: {', '.join(sorted(known))}")
    return content


def settings(pairs: list[str], where: str = "--set") -> dict[str, str]:
    """`["rank=8", ...]` as a mapping; ConfigError for an entry without `=`."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"{where} {pair!r}: write it as name=value")
        if name.strip() in found:
            raise ConfigError(f"{where} {pair!r}: {name.strip()} is set twice: give it once")
        found[name.strip()] = value.strip()
    return found


def json_object(text: str | None, where: str) -> dict[str, Any]:
    """The JSON object an option gives, empty when it is not given; ConfigError for anything else."""
    try:
        value = documents.from_json(text) if text is not None else {}
    except ValueError as error:
        raise ConfigError(f"{where} {text!r:.60}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} {text!r:.60}: must be a JSON object, '{{\"name\": value}}'")
    return value


def merged(*layers: dict[str, Any]) -> dict[str, Any]:
    """Later layers win; None means not set."""
    result: dict[str, Any] = {}
    for layer in layers:
        result |= {name: value for name, value in layer.items() if value is not None}
    return result


def load_named(
    model: str, adapters: list[str] | None, *, base: str
) -> "tuple[LanguageModel, dict[str, AdapterMeta]]":
    """The model with the adapters of --adapter NAME=FOLDER, or FOLDER; ConfigError where two of them, or the
    base, would have one name."""
    from mlx_adapters.adapter.multi import load_adapters
    from mlx_adapters.models.load import load

    folders: dict[str, Path] = {}
    for text in adapters or []:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).is_dir():
            name, folder = Path(text).resolve().name, text
        if not name or not folder:
            raise ConfigError(f"--adapter {text}: give NAME=FOLDER")
        if name in folders or name == base:
            raise ConfigError(f"two models would be named {name}: give --adapter OTHERNAME={folder}")
        folders[name] = Path(folder)
    loaded = load(model, answering=True)
    return loaded, load_adapters(loaded, folders) if folders else {}


def _plain(hint: Any) -> Any:
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    return arguments[0] if arguments else hint
