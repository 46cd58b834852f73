"""What LoRA can do besides linear layers: an update of the token embedding, and modules trained whole."""

from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import ConfigError, UnsupportedError
from mlx_adapters.methods import ln_tuning
from mlx_adapters.methods.base import LINEARS, AdapterLayer, OnEmbedding, dims, linear_like, plain_weight

__all__ = ["EMBEDDINGS", "EmbeddingLayer", "ModulesToSave", "NormToSave", "module_to_save"]

EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


class EmbeddingLayer(OnEmbedding):
    """`E[ids] + scale * A^T[ids] B^T`: A [rank, vocabulary] starts at zero, B [width, rank] at random.

    A tied output head stays the base's, as in PEFT.
    """

    TENSORS: ClassVar[dict[str, str]] = {
        "lora_embedding_a": "lora_embedding_A",
        "lora_embedding_b": "lora_embedding_B",
    }

    def __init__(self, base: nn.Module, *, rank: int, scale: float, tied: bool) -> None:
        super().__init__()
        width, vocabulary = dims(base)
        self.base = base
        self.scale = scale
        self.tied = tied
        self.lora_embedding_a = mx.zeros((rank, vocabulary))
        self.lora_embedding_b = mx.random.normal((width, rank))

    def __call__(self, ids: mx.array) -> mx.array:
        y = self.base(ids)
        low = self.lora_embedding_a.T[ids] * self.scale
        return y + (low @ self.lora_embedding_b.T).astype(y.dtype)

    def table(self) -> mx.array:
        """The embedding's weight with the update in it, float32 [vocabulary, width]."""
        update = (self.lora_embedding_b @ self.lora_embedding_a).T
        return plain_weight(self.base).astype(mx.float32) + self.scale * update

    def merge(self) -> nn.Module:
        """A plain embedding with the trained table; ConfigError where the head shares its weight."""
        if self.tied:
            raise ConfigError(
                "an update of a tied embedding cannot be merged: the output head would get it too"
            )
        merged = nn.Embedding(1, 1)
        merged.weight = self.table()
        return merged


def module_to_save(base: nn.Module, path: str) -> AdapterLayer:
    """The layer for a module of PEFT's `modules_to_save`; UnsupportedError for one of another kind."""
    if isinstance(base, LINEARS + EMBEDDINGS):
        return ModulesToSave(base)
    if "weight" in base and "norm" in type(base).__name__.lower():
        return NormToSave(base)
    raise UnsupportedError(
        f"modules_to_save: {path} is a {type(base).__name__}: only linear layers, embeddings and norms are "
        "trained whole"
    )


class NormToSave(ln_tuning.Layer):
    """A norm whose own weight (and bias) is trained."""

    TENSORS: ClassVar[dict[str, str]] = {"weight": "weight", "bias": "bias"}
    TARGET: ClassVar[bool] = False


class ModulesToSave(AdapterLayer):
    """A linear layer or an embedding whose own weight (and bias) is trained."""

    TENSORS: ClassVar[dict[str, str]] = {"weight": "weight", "bias": "bias"}
    TARGET: ClassVar[bool] = False

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
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
