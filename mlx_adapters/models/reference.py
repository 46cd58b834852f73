"""What transformers' models read of their configurations: a table made by asking transformers.

`python tests/support/reference_table.py --write`, in the repository, makes it; a test makes it again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mlx_adapters.files.documents import from_json

__all__ = ["TABLE", "Reference", "Window", "reference"]

TABLE = Path(__file__).with_name("reference.json")
"""`models`: {model_type: the facts of a `Reference`}; `transformers`: the version that was asked."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """How a model finds the layers that see only the last `sliding_window` tokens.

    `default` is the window where the configuration has none, `switched` whether `use_sliding_window` must be
    set, `layers` which layers where `layer_types` is absent: `all`; `upper`, those from `max_window_layers`
    on; `lower`, every other one below it; or a period of s (sliding) and f (full). With `all`, `layer_types`
    is not read.
    """

    default: int | None
    switched: bool
    layers: str


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What transformers' model of one `model_type` reads.

    `rotation` says whether its rotary angles follow the common formulas, and then whether every type of layer
    has its own; `theta` is their base where the configuration has none; `mscales`, whether LongRoPE's factors
    of attention are read. `activation` is the field that names the activation of the MLP, with its default;
    `misnamed`, names of activations that are read as others. `time_step` says what limits the time steps of
    state-space layers: the field time_step_limit (`limit`), or time_step_min alone (`floor`).
    """

    rotation: str | None = None
    theta: float | None = None
    mscales: bool = False
    activation: tuple[str, str] | None = None
    misnamed: Mapping[str, str] = field(default_factory=dict)
    window: Window | None = None
    time_step: str | None = None


_NONE = Reference()


def reference(model_type: str) -> Reference:
    """The facts about `model_type`; empty ones where transformers does not have it."""
    facts = _models().get(model_type)
    if facts is None:
        return _NONE
    window, activation = facts.get("window"), facts.get("activation")
    return Reference(
        rotation=facts.get("rotation"),
        theta=facts.get("theta"),
        mscales=facts.get("mscales", False),
        activation=tuple(activation) if activation else None,
        misnamed=facts.get("misnamed", {}),
        window=Window(**window) if window else None,
        time_step=facts.get("time_step"),
    )


@cache
def _models() -> dict[str, Any]:
    models: dict[str, Any] = from_json(TABLE.read_text(encoding="utf-8"))["models"]
    return models
