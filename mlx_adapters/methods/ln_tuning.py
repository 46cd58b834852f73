"""LN tuning's layer and its options."""

import copy
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import ConfigError
from mlx_adapters.fields import field
from mlx_adapters.methods.base import AdapterLayer, Method, Placed, peft_targets
from mlx_adapters.methods.peft_fields import COMMON, Fields
from mlx_adapters.models import sites


class Layer(AdapterLayer):
    """A norm with weights of its own."""

    TENSORS: ClassVar[dict[str, str]] = {
        "weight": "ln_tuning_layers.weight",
        "bias": "ln_tuning_layers.bias",
    }

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.own = copy.deepcopy(base)
        self.own.unfreeze()
        self.own.update({name: mx.array(value).astype(mx.float32) for name, value in self.tensors().items()})

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        # the norms of state-space and linear-attention blocks are given a gate as well
        return self.own(x, *args, **kwargs).astype(x.dtype)

    def tensors(self) -> dict[str, mx.array]:
        return {name: self.own[name] for name in self.TENSORS if name in self.own}

    def load_weights(self, arrays: dict[str, mx.array]) -> None:
        self.own.update(arrays)

    def merge(self) -> nn.Module:
        """The norm with the trained weights."""
        return self.own


class LNTuning(Method):
    """LN tuning: the weights (and biases) of the norms. Zhao et al. 2023, https://arxiv.org/abs/2312.11420

        y = norm(x) with its own weight and bias

    The base's norms stay as they are; copies of them train and are saved.
    """

    NAME = "ln_tuning"
    TITLE = "LN tuning: the weights (and biases) of the norms"
    AUTHORS = "Zhao et al. 2023"
    PAPER = "https://arxiv.org/abs/2312.11420"
    PEFT_TYPE = "LN_TUNING"
    PEFT_FIELDS = COMMON
    LAYERS = (Layer,)
    STANDS_ON = "norms"

    targets: str = field("all", "all norms of the blocks and the last one, or names a,b")

    def place(self, model: nn.Module, model_type: str, paths: list[str] | None = None) -> Placed:
        """A copy in the place of each chosen norm."""
        modules = dict(model.named_modules())
        norms = [p for p, m in modules.items() if "weight" in m and "norm" in type(m).__name__.lower()]
        if paths is None and self.targets == "all":
            paths = norms
        elif paths is None:
            names = [name.strip() for name in self.targets.split(",")]
            paths = [path for path in norms if any(sites.matches(path, name) for name in names)]
        if not paths:
            known = sorted({path.rpartition(".")[2] for path in norms})
            raise ConfigError(f"ln_tuning: targets {self.targets!r} match no norm. Known: {', '.join(known)}")
        return {path: Layer(modules[path]) for path in paths}

    def to_peft(self) -> Fields:
        return {"modules_to_save": None}

    @classmethod
    def from_peft(cls, fields: Fields) -> Self:
        return cls(targets=peft_targets(fields, otherwise="all"))
