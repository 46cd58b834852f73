"""Layers for a token embedding that is the output head too, of which only one is changed, or each by itself.

PEFT gives the two adapters of their own, so they are tied no longer: the embedding's tensors stand under its
own name and the head's under `lm_head`, which is no module here.
"""

from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import ConfigError
from mlx_adapters.methods.base import OnEmbedding, dims, plain_weight

__all__ = ["HEAD", "HeadUpdate", "TiedToSave"]

HEAD = "lm_head"
"""What transformers calls an output head that is the embedding."""
_NAMED = f"base_model.model.{HEAD}"
_APART = "embedding and output head are one matrix here and would become two: keep it as an adapter"


class TiedToSave(OnEmbedding):
    """Weights of its own for the embedding, for the head, or one for each."""

    # the attribute `weight` is what others read of the head
    TENSORS: ClassVar[dict[str, str]] = {"table": "weight", "head_weight": f"{_NAMED}.weight"}
    TARGET: ClassVar[bool] = False

    def __init__(self, base: nn.Module, *, table: bool, head: bool) -> None:
        super().__init__()
        self.base = base
        for name in ("table",) * table + ("head_weight",) * head:
            self[name] = mx.array(plain_weight(base)).astype(mx.float32)

    @property
    def weight(self) -> mx.array:
        """The head's."""
        own: mx.array = self.get("head_weight", self.base.weight)
        return own

    def __call__(self, ids: mx.array) -> mx.array:
        y: mx.array = self["table"][ids] if "table" in self else self.base(ids)
        return y

    def as_linear(self, x: mx.array) -> mx.array:
        """The head."""
        if "head_weight" not in self:
            return self.base.as_linear(x)
        return x @ self["head_weight"].T.astype(x.dtype)

    def accept(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """A file calls the table's weight as every module's."""
        return {"table" if name == "weight" else name: array for name, array in arrays.items()}

    def merge(self) -> nn.Module:
        """ConfigError: what is one matrix cannot become two."""
        raise ConfigError(_APART)


class HeadUpdate(OnEmbedding):
    """`E x + scale * B A x` as the head, and the embedding as it was."""

    TENSORS: ClassVar[dict[str, str]] = {
        "head_lora_a": f"{_NAMED}.lora_A.weight",
        "head_lora_b": f"{_NAMED}.lora_B.weight",
    }
    CALLED: ClassVar[str] = HEAD

    def __init__(self, base: nn.Module, *, rank: int, scale: float) -> None:
        super().__init__()
        width, vocabulary = dims(base)
        bound = 1 / width**0.5
        self.base = base
        self.scale = scale
        self.head_lora_a = mx.random.uniform(-bound, bound, (rank, width))
        self.head_lora_b = mx.zeros((vocabulary, rank))

    @property
    def weight(self) -> mx.array:
        """The head's."""
        own = plain_weight(self.base)
        return own + (self.scale * (self.head_lora_b @ self.head_lora_a)).astype(own.dtype)

    def __call__(self, ids: mx.array) -> mx.array:
        y: mx.array = self.base(ids)
        return y

    def as_linear(self, x: mx.array) -> mx.array:
        """The head with its update."""
        y = self.base.as_linear(x)
        return y + (((x @ self.head_lora_a.T) * self.scale) @ self.head_lora_b.T).astype(y.dtype)

    def merge(self) -> nn.Module:
        """ConfigError: what is one matrix cannot become two."""
        raise ConfigError(_APART)
