"""What LoRA can do besides linear layers: an update of the token embedding, and modules trained whole."""

from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import AdapterError, ConfigError, UnsupportedError
from mlx_adapters.methods.base import LINEARS, AdapterLayer, OnEmbedding, dims, linear_like, plain_weight

__all__ = ["EMBEDDINGS", "EmbeddingLayer", "Saved"]

EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


class EmbeddingLayer(OnEmbedding):
    """`E[ids] + scale * A^T[ids] B^T`: A [rank, words] starts at zero, B [width, rank] at random.

    A tied output head stays the base's, as in PEFT.
    """

    TENSORS: ClassVar[dict[str, str]] = {
        "lora_embedding_a": "lora_embedding_A",
        "lora_embedding_b": "lora_embedding_B",
    }
    # PEFT writes the base's table beside the update of an embedding called embed_tokens
    ALIASES: ClassVar[dict[str, str]] = {"table": "base_layer.weight"}

    def __init__(self, base: nn.Module, *, rank: int, scale: float, tied: bool) -> None:
        super().__init__()
        width, words = dims(base)
        self.base = base
        self.scale = scale
        self.tied = tied
        self.lora_embedding_a = mx.zeros((rank, words))
        self.lora_embedding_b = mx.random.normal((width, rank))

    def __call__(self, ids: mx.array) -> mx.array:
        y = self.base(ids)
        low = self.lora_embedding_a.T[ids] * self.scale
        return y + (low @ self.lora_embedding_b.T).astype(y.dtype)

    def accept(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        own, table = plain_weight(self.base), arrays.get("table")
        # the same up to the rounding of a quantized base
        if table is not None and not (
            table.shape == own.shape and float(mx.abs(table - own).mean()) <= 0.1 * float(mx.abs(own).mean())
        ):
            raise AdapterError(
                f"the file holds an embedding table of its own {list(table.shape)}, which is not the base's "
                f"{list(own.shape)}: convert the base with that table (vocabulary) first"
            )
        return {name: array for name, array in arrays.items() if name != "table"}

    def merge(self) -> nn.Module:
        """A plain embedding with the update in it; ConfigError where the head shares its weight."""
        if self.tied:
            raise ConfigError(
                "an update of a tied embedding cannot be merged: the output head would get it too"
            )
        merged = nn.Embedding(1, 1)
        update = (self.lora_embedding_b @ self.lora_embedding_a).T
        merged.weight = plain_weight(self.base).astype(mx.float32) + self.scale * update
        return merged


class Saved(AdapterLayer):
    """A linear layer or an embedding whose own weight (and bias) is trained; PEFT's `modules_to_save`."""

    TENSORS: ClassVar[dict[str, str]] = {"weight": "weight", "bias": "bias"}
    TARGET: ClassVar[bool] = False

    def __init__(self, base: nn.Module, path: str) -> None:
        super().__init__()
        if not isinstance(base, LINEARS + EMBEDDINGS):
            raise UnsupportedError(
                f"modules_to_save: {path} is neither a linear layer nor an embedding; norms are trained by "
                "method ln_tuning"
            )
        self.base = base
        self.embeds = isinstance(base, EMBEDDINGS)
        self.weight = mx.array(plain_weight(base)).astype(mx.float32)
        if "bias" in base:
            self.bias = mx.array(base.bias).astype(mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        if self.embeds:
            return self.weight[x]
        y = x @ self.weight.T.astype(x.dtype)
        return y + self.bias.astype(y.dtype) if "bias" in self else y

    def merge(self) -> nn.Module:
        """A plain module with the trained weight."""
        if not self.embeds:
            return linear_like(self.base, self.weight, self.get("bias"))
        merged = nn.Embedding(1, 1)
        merged.weight = self.weight
        return merged
