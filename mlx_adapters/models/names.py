"""Where each tensor of an MLX model comes from in its checkpoint, as `marks` measures it.

A name is kept as a template, `#` for each number in it: `model.layers.#.mlp.up_proj.weight`.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlx_adapters.models.origin import recorded, with_record

__all__ = [
    "Names",
    "Part",
    "as_record",
    "fill",
    "from_config",
    "from_record",
    "into_config",
    "names_of",
    "numbers_of",
    "template",
]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_RECORD = "names"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of an MLX tensor that come from one tensor of the checkpoint.

    `rows` of the source, (start, stop, step), become the next rows of the MLX tensor, times `scale`, plus
    `shift`; `along` is another axis of the MLX tensor that is cut instead of the first. `axes` holds for each
    axis of the MLX tensor that of the source. With `stacked` there is one source for each index of the first
    axis, and `*` in the name of `source` stands for it.
    """

    source: str
    rows: tuple[int, int, int] | None = None
    scale: float = 1.0
    shift: float = 0.0
    axes: tuple[int, ...] | None = None
    along: int = 0
    stacked: int = 0

    @property
    def count(self) -> int:
        """The number of rows; 0 for all of them."""
        return len(range(*self.rows)) if self.rows else 0


@dataclass(frozen=True)
class Names:
    """The parts of each MLX tensor, by template: the index of the base.

    An empty tuple of parts is a tensor whose origin is not one that `Part` describes.
    """

    tensors: dict[str, tuple[Part, ...]]

    @property
    def same(self) -> bool:
        """Whether every tensor has the checkpoint's name and values."""
        return all(parts == (Part(source=name),) for name, parts in self.tensors.items())

    def parts(self, name: str) -> tuple[Part, ...]:
        """Where the MLX tensor `name` comes from."""
        found = self.tensors.get(template(name), ())
        return tuple(replace(part, source=fill(part.source, numbers_of(name))) for part in found)


def names_of(model: Any) -> Names | None:
    """Where the tensors of a loaded model come from, measured when first asked; None where not known."""
    found: Any = getattr(model, "tensor_names", None)
    if callable(found):
        found = model.tensor_names = found()
    names: Names | None = found
    return names


def template(name: str) -> str:
    """`name` with `#` for each number in it."""
    return _NUMBER.sub("#", name)


def numbers_of(name: str) -> list[str]:
    """The numbers in `name`."""
    return _NUMBER.findall(name)


def fill(text: str, numbers: Iterable[str]) -> str:
    """The template `text` with the numbers in it."""
    for number in numbers:
        text = text.replace("#", number, 1)
    return text


def into_config(config: dict[str, Any], names: Names | None) -> dict[str, Any]:
    """A copy of `config` that remembers `names`."""
    return with_record(config, _RECORD, None if names is None else as_record(names))


def from_config(config: dict[str, Any]) -> Names | None:
    """The names that a converted model's `config` remembers; None where they were not measured."""
    record = recorded(config).get(_RECORD)
    return from_record(record) if isinstance(record, dict) else None


def as_record(names: Names) -> dict[str, Any]:
    """`names` for a JSON file: `same` lists the tensors of the checkpoint's name and values, `made` has what
    differs from the defaults of `Part` for the others."""
    usual = asdict(Part(source=""))
    same = [name for name, parts in names.tensors.items() if parts == (Part(source=name),)]
    made = {
        name: [{k: v for k, v in asdict(part).items() if v != usual[k]} for part in parts]
        for name, parts in names.tensors.items()
        if name not in set(same)
    }
    return {"same": same, "made": made}


def from_record(record: dict[str, Any]) -> Names:
    """The inverse of `as_record`."""
    tuples = ("rows", "axes")

    def part(fields: dict[str, Any]) -> Part:
        values: dict[str, Any] = {k: tuple(v) if k in tuples else v for k, v in fields.items()}
        return Part(**values)

    same = {name: (Part(source=name),) for name in record.get("same", ())}
    return Names(same | {name: tuple(map(part, parts)) for name, parts in record.get("made", {}).items()})
