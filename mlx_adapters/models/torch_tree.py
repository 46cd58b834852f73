"""The modules of a model in PyTorch, and where their rows are in the model here: names and rows both ways.

The checkpoint stands between the two: `names` says what mlx-lm's model file makes of its tensors, and
`torch_names` what transformers makes of their names.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_adapters.models.names import Names, Part, fill, names_of, numbers_of, template
from mlx_adapters.models.sites import to_hf
from mlx_adapters.models.torch_names import torch_name

__all__ = ["Spot", "TorchTree", "torch_path", "tree_of"]

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Spot:
    """Rows of a module in PyTorch that are rows of one here: of `module` there and of `path` here.

    `parts` follow one another in the rows here. `simple` is the whole module with the values it has there.
    """

    module: str
    path: str
    parts: tuple[Part, ...]

    @property
    def simple(self) -> bool:
        """Whether only the name differs, and the matrix may be transposed."""
        return all(replace(part, axes=None) == Part(source=part.source) for part in self.parts)

    @property
    def split(self) -> bool:
        """Whether the module in PyTorch has other rows too."""
        return len(self.parts) == 1 and self.parts[0].rows is not None

    def rows(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each of the `count` rows here: (its row in PyTorch, its factor, what is added)."""
        rows, scales, shifts = [], [], []
        for part in self.parts:
            own = np.arange(*part.rows) if part.rows else np.arange(count)
            rows.append(own)
            scales.append(np.full(len(own), part.scale))
            shifts.append(np.full(len(own), part.shift))
        return np.concatenate(rows), np.concatenate(scales), np.concatenate(shifts)


@dataclass(frozen=True)
class TorchTree:
    """A model's modules by the names of PyTorch. `names` are None where they were not measured."""

    names: Names | None
    model_type: str

    def spots(self, path: str) -> tuple[Spot, ...]:
        """Where the module at `path` is in PyTorch; empty where its weight has no known origin in the
        checkpoint."""
        if self.names is None:
            return (Spot(to_hf(path, self.model_type), path, (Part(source=""),)),)
        numbers = numbers_of(path)
        if (found := self._forward.get(template(path))) is not None:
            return tuple(Spot(fill(module, numbers), path, parts) for module, parts in found)
        if (module := self._modules.get(template(path))) is not None:
            return (Spot(fill(module, numbers), path, (Part(source=""),)),)
        return ()

    def sources(self, module: str) -> tuple[Spot, ...]:
        """What of the model here the module of PyTorch is; empty where nothing is."""
        if self.names is None:
            return ()
        module = torch_name(module + _WEIGHT, self.model_type).removesuffix(_WEIGHT)
        kind, numbers = template(module), numbers_of(module)
        if found := self._backward.get(kind):
            return tuple(Spot(module, fill(path, numbers), parts) for path, parts in found)
        if (path := self._places.get(kind)) is not None:
            return (Spot(module, fill(path, numbers), (Part(source=""),)),)
        return ()

    def path(self, path: str) -> str:
        """What PyTorch calls the module at `path` here, or the one that it is a part of."""
        spots = self.spots(path)
        return spots[0].module if spots else to_hf(path, self.model_type)

    def size(self, module: str) -> int:
        """The rows of a module of PyTorch whose rows are in several modules here."""
        stops = [part.rows[1] for spot in self.sources(module) for part in spot.parts if part.rows]
        return max(stops, default=0)

    @cached_property
    def _forward(self) -> dict[str, tuple[tuple[str, tuple[Part, ...]], ...]]:
        """{template of a path: ((template of the module in PyTorch, parts), ...)}, of those with a weight."""
        found: dict[str, tuple[tuple[str, tuple[Part, ...]], ...]] = {}
        for name, parts in self.names.tensors.items() if self.names else ():
            if not name.endswith(_WEIGHT) or any(part.stacked for part in parts):
                continue
            own: dict[str, list[Part]] = {}
            for part in parts:
                own.setdefault(torch_name(part.source, self.model_type).removesuffix(_WEIGHT), []).append(
                    part
                )
            found[name.removesuffix(_WEIGHT)] = tuple((module, tuple(p)) for module, p in own.items())
        return found

    @cached_property
    def _backward(self) -> dict[str, list[tuple[str, tuple[Part, ...]]]]:
        """The inverse of `_forward`."""
        found: dict[str, list[tuple[str, tuple[Part, ...]]]] = {}
        for path, modules in self._forward.items():
            for module, parts in modules:
                found.setdefault(module, []).append((path, parts))
        return {
            module: sorted(spots, key=lambda spot: spot[1][0].rows or ()) for module, spots in found.items()
        }

    @cached_property
    def _modules(self) -> dict[str, str]:
        """{template of a path: that of the module in PyTorch}, for modules that hold others."""
        found: dict[str, str] = {}
        for name, parts in self.names.tensors.items() if self.names else ():
            if len(parts) != 1:
                continue
            theirs = torch_name(parts[0].source, self.model_type).split(".")
            ours = name.split(".")
            stack = len(ours) > 2 and ours != theirs and re.fullmatch("switch_(mlp|glu)|experts", ours[-3])
            if parts[0].stacked or stack:
                # a stack of experts is a parameter there: what holds it is what holds the stacks here
                found.setdefault(".".join(ours[:-2]), ".".join(theirs[:-1]))
            while ours and theirs and ours[-1] == theirs[-1]:
                ours, theirs = ours[:-1], theirs[:-1]
                if ours and theirs:
                    found.setdefault(".".join(ours), ".".join(theirs))
        return found

    @cached_property
    def _places(self) -> dict[str, str]:
        """The inverse of `_modules`."""
        return {module: path for path, module in self._modules.items()}


def tree_of(model: nn.Module, model_type: str) -> TorchTree:
    """The names of PyTorch for `model`; those of the architecture's row where none were measured."""
    found: Any = getattr(model, "torch_tree", None)
    if found is None or found.model_type != model_type:
        found = TorchTree(names_of(model), model_type)
        model.torch_tree = found
    tree: TorchTree = found
    return tree


def torch_path(model: nn.Module, path: str, model_type: str) -> str:
    """What PyTorch calls the module at `path` of `model`."""
    return tree_of(model, model_type).path(path)
