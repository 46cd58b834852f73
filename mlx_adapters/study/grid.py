"""A study's YAML file, and the cells of its grid.

    model: my-model              a folder or a hub id
    data: math_10k.json          what `train --data` takes, or `wordproblems` (generated)
    tasks: math                  what `eval --task` takes
    train: {epochs: 3, ...}      fields of TrainConfig, for every cell
    seeds: [0, 1]
    grid:
      - method: lora
        set: {alpha: 2*rank}                           fields of the method; one may be N times another
        placement: {attn: {targets: attn}, mlp: {targets: mlp}}    a name for each choice of fields
        size: {rank: [4, 8]}                           one field and its values
        lr: [1.0e-3, 3.0e-4]
        train: {batch_size: 8}                         over the study's `train`

Each entry of `grid` stands for the product of its placements, sizes, rates and the seeds.
"""

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from mlx_adapters.errors import ConfigError, unknown
from mlx_adapters.evaluate.answers import RULES, Extraction
from mlx_adapters.evaluate.protocol import DEFAULTS, PROTOCOLS, chosen
from mlx_adapters.fields import current, field, parse_fields
from mlx_adapters.files.documents import read_yaml
from mlx_adapters.train.config import TrainConfig

__all__ = ["GENERATED", "Cell", "Study", "read"]

GENERATED = "wordproblems"
_KEYS = ("method", "set", "placement", "size", "lr", "train")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What holds for every cell: the keys of the file besides model, config, train, seeds and grid."""

    name: str = field("", "the report's title")
    data: str = field(GENERATED, "training data")
    rows: int = field(2000, "how many rows of the generated data")
    tasks: str = field(GENERATED, "test sets, joined by commas")
    data_dir: str | None = field(None, "folder with NAME/test.json")
    exclude: str | None = field(None, "test files whose items are not trained on, joined by commas")
    limit: int | None = field(None, "items of each test set")
    max_tokens: int | None = field(None, "longest answer")
    batch_size: int | None = field(None, "rows decoded together, by default what memory allows")
    decoding: str = field("greedy", "greedy or beam")
    protocol: str | None = field(None, "paper: beams, template, longest answers and reading as in the paper")
    test_seed: int = field(1, "draws the items of limit")
    base: bool = field(True, "measure the base model too")

    def __post_init__(self) -> None:
        for name in ("rows", "limit", "max_tokens", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.decoding not in ("greedy", "beam"):
            raise ConfigError(unknown("decoding", self.decoding, ("greedy", "beam")))

    @property
    def reading(self) -> Extraction:
        """Which reading of an answer counts."""
        reading: Extraction = (PROTOCOLS[self.protocol] if self.protocol else DEFAULTS)["reading"]
        return reading

    @property
    def rules(self) -> str:
        """How reports name that reading; another name means that it changed."""
        return RULES[self.reading]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One adapter to train and measure. `id` names its folder."""

    id: str
    method: str
    placement: str
    size: str
    fields: dict[str, Any]
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole file. `config` is a model's config.json, for counting parameters without the model."""

    model: str
    config: dict[str, Any] | None
    settings: Settings
    cells: tuple[Cell, ...]

    def common(self) -> dict[str, Any]:
        """What two runs of the study must share, besides a cell's own settings."""
        shared = asdict(self.settings)
        del shared["name"], shared["base"]
        if self.settings.protocol is None:
            del shared["protocol"]  # as in the folders of versions that had none
        return {"model": self.model, **shared}


def read(
    source: str | Path | Mapping[str, Any],
    *,
    model: str | None = None,
    max_steps: int | None = None,
    limit: int | None = None,
) -> Study:
    """Read and check a study, a YAML file or what it would hold; `model` and `limit` win over it, `max_steps`
    cuts every run short.

    Raises ConfigError with one line that names the file, the key and what is allowed.
    """
    file = Path("study") if isinstance(source, Mapping) else Path(source)
    content = _mapping(dict(source) if isinstance(source, Mapping) else read_yaml(file), str(file))
    own = {f.name for f in dataclasses.fields(Settings)}
    _known(content, {"model", "config", "train", "seeds", "grid", *own}, str(file))
    chosen = model or content.get("model")
    if not isinstance(chosen, str) or not chosen:
        raise ConfigError(f"{file}: key 'model' is missing. Name a folder or a hub id there, or with --model")
    grid = content.get("grid")
    if not isinstance(grid, list) or not grid:
        raise ConfigError(f"{file}: key 'grid' must be a list of methods, found {grid!r}")
    settings = _checked(Settings, {k: v for k, v in content.items() if k in own}, str(file))
    asked = {name: content.get(name) for name in ("decoding", "max_tokens")}
    settings = replace(settings, decoding=_settled(settings.protocol, asked, str(file))["decoding"])
    train = _mapping(content.get("train", {}), f"{file}: key 'train'")
    seeds = _values(content.get("seeds", [0]), f"{file}: key 'seeds'")
    cells: dict[str, Cell] = {}
    for number, entry in enumerate(grid, start=1):
        for cell in _cells(entry, train, seeds, f"{file}: grid entry {number}"):
            template = _settled(settings.protocol, {"template": cell.train.template}, str(file))
            cell = replace(cell, train=replace(cell.train, template=template.get("template")))
            if cell.id in cells:
                raise ConfigError(f"{file}: grid entry {number}: the cell {cell.id} is there already")
            cells[cell.id] = _budgeted(cell, max_steps)
    config = content.get("config")
    return Study(
        model=chosen,
        config=_mapping(config, f"{file}: key 'config'") if config is not None else None,
        settings=replace(settings, limit=limit or settings.limit, name=settings.name or file.stem),
        cells=tuple(cells.values()),
    )


def _settled(protocol: str | None, options: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return chosen(protocol, options)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _cells(entry: Any, train: dict[str, Any], seeds: list[Any], where: str) -> list[Cell]:
    from mlx_adapters import methods

    entry = _mapping(entry, where)
    _known(entry, set(_KEYS), where)
    method = entry.get("method")
    if method not in methods.names():
        raise ConfigError(f"{where}: key 'method': " + unknown("method", str(method), methods.names()))
    fixed = _mapping(entry.get("set", {}), f"{where}: key 'set'")
    places = _mapping(entry.get("placement", {"": {}}), f"{where}: key 'placement'")
    sizes = _mapping(entry.get("size", {}), f"{where}: key 'size'")
    if len(sizes) > 1:
        raise ConfigError(f"{where}: key 'size' must name one field of {method}, found {', '.join(sizes)}")
    values: list[tuple[str, Any] | None] = [
        (name, value) for name, found in sizes.items() for value in _values(found, f"{where}: {name}")
    ]
    run = train | _mapping(entry.get("train", {}), f"{where}: key 'train'")
    rates = _values(entry["lr"], f"{where}: key 'lr'") if "lr" in entry else [run.get("lr")]
    cells = []
    for (place, fields), size, rate, seed in product(places.items(), values or [None], rates, seeds):
        chosen_fields = (
            fixed | _mapping(fields, f"{where}: placement {place!r}") | (dict([size]) if size else {})
        )
        try:
            made = asdict(methods.make(method, _computed(method, chosen_fields)))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        rate_of_cell = {"lr": rate} if rate is not None else {}
        # budget and length of every cell are what the file says, whatever the rows: cells are compared
        train_fields = _PAPER | current(TrainConfig, run) | {"seed": seed} | rate_of_cell
        config = _checked(TrainConfig, train_fields, where)
        text = f"{size[0]} {size[1]}" if size else ""
        parts = [method, str(place), f"{size[0]}{size[1]}" if size else ""]
        parts += [f"lr{config.lr:g}" if len(rates) > 1 else "", f"seed{seed}" if len(seeds) > 1 else ""]
        name = "-".join("".join(c if c.isalnum() or c in "_.+" else "_" for c in p) for p in parts if p)
        cells.append(Cell(id=name, method=method, placement=str(place), size=text, fields=made, train=config))
    return cells


_PAPER = {"epochs": 3, "max_length": 256}
_PRODUCT = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*\*\s*([A-Za-z_]\w*)\s*")


def _computed(method: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, with each number that is written as a multiple of another one ("2*rank") computed."""
    from mlx_adapters import methods

    kind = methods.find(method)
    hints, known = typing.get_type_hints(kind), {one.name: one.default for one in dataclasses.fields(kind)}
    found = dict(fields)
    for name, value in fields.items():
        times = _PRODUCT.fullmatch(value) if isinstance(value, str) else None
        if times is None or not {int, float} & {hints.get(name), *typing.get_args(hints.get(name))}:
            continue
        other = times[2]
        if other not in known:
            raise ConfigError(f"{name}={value!r}: " + unknown(f"field of {method}", other, known))
        base = fields.get(other, known[other])
        try:
            number = float(times[1]) * float(str(base))
        except ValueError:
            raise ConfigError(
                f"{method}: {name}={value!r} needs {other} to be a number, found {base!r}"
            ) from None
        found[name] = int(number) if number.is_integer() else number
    return found


def _budgeted(cell: Cell, max_steps: int | None) -> Cell:
    """At most `max_steps` optimizer steps; a run counted in epochs gets exactly as many."""
    if max_steps is None or (cell.train.steps or max_steps + 1) <= max_steps:
        return cell
    return replace(cell, train=replace(cell.train, steps=max_steps))


def _checked(kind: type, values: dict[str, Any], where: str) -> Any:
    try:
        return parse_fields(kind, values, where=where)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from None


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must be a mapping of names to values, found {value!r}")
    return {str(key): item for key, item in value.items()}


def _values(value: Any, where: str) -> list[Any]:
    found = value if isinstance(value, list) else [value]
    if not found or any(isinstance(one, (list, dict)) for one in found):
        raise ConfigError(f"{where}: must be a value or a list of values, found {value!r}")
    return found


def _known(found: dict[str, Any], known: set[str], where: str) -> None:
    if strange := sorted(set(found) - known):
        raise ConfigError(f"{where}: " + unknown("key", strange[0], known))
