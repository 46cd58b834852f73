"""The routers of mixtures of experts, and what they compute, found in the module tree.

A router is the linear layer with one output for each expert that stands beside the stacked experts, or in a
module beside them. Models whose router is no linear layer (deepseek_v3 chooses groups first) have none here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

__all__ = ["BLOCKS", "Choice", "recorded", "routers"]

BLOCKS = ("SwitchGLU", "SwitchMLP")
"""mlx-lm's classes of a mixture's experts. By name: importing mlx-lm takes seconds."""

_NAMES = {"gate", "router", "wg", "classifier"}


@dataclass
class Choice:
    """What one router computed: its logits [..., experts], and how many experts each token goes to."""

    logits: mx.array
    top_k: int = 0


def routers(model: nn.Module) -> dict[str, str]:
    """{path of a router: path of the experts that it chooses from}, in the order of the model."""
    modules = dict(model.named_modules())
    blocks = {_outer(path): module for path, module in modules.items() if type(module).__name__ in BLOCKS}
    linears = {
        _outer(path): module.weight.shape[0]
        for path, module in modules.items()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear)) and _NAMES & set(path.split("."))
    }
    found: dict[str, str] = {}
    for block, module in blocks.items():
        experts = next(iter(module.children().values()))["weight"].shape[0]
        beside = block.rpartition(".")[0]
        for holder in (beside, beside.rpartition(".")[0]):  # gemma4 has the router beside the module of both
            own = [p for p, out in linears.items() if p.startswith(f"{holder}.") and out == experts]
            if len(own) == 1:
                found[own[0]] = block
                break
    return found


def _outer(path: str) -> str:
    """The place of a module, which an adapter may have taken."""
    while path.endswith(".base"):
        path = path.removesuffix(".base")
    return path


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Choice]]:
    """A list that fills with the choices of the routers, in the order in which the model calls them."""
    modules, choices = dict(model.named_modules()), list[Choice]()
    classes, latest = list[tuple[Any, type]](), dict[int, Choice]()

    def watch(module: Any, call: Any) -> None:
        kind = type(module)
        classes.append((module, kind))
        module.__class__ = type(
            kind.__name__, (kind,), {"__call__": call(kind), "__module__": kind.__module__}
        )

    def pair(router: Any, block: Any) -> None:
        def logits(kind: Any) -> Any:
            def call(self: Any, x: mx.array) -> mx.array:
                choices.append(Choice(kind.__call__(self, x)))
                latest[id(block)] = choices[-1]
                return choices[-1].logits

            return call

        def experts(kind: Any) -> Any:
            def call(self: Any, x: mx.array, indices: mx.array) -> mx.array:
                latest[id(self)].top_k = indices.shape[-1]
                y: mx.array = kind.__call__(self, x, indices)
                return y

            return call

        watch(router, logits)
        watch(block, experts)

    try:
        for router, block in routers(model).items():
            pair(modules[router], modules[block])
        yield choices
    finally:
        for module, kind in classes:
            module.__class__ = kind
