"""DoRA's layer and its options."""

import math
from typing import ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.fields import field
from mlx_adapters.methods.base import (
    LAYERS_HELP,
    TARGETS_HELP,
    AdapterLayer,
    Placed,
    dims,
    linear_like,
    plain_weight,
    resolve_targets,
)
from mlx_adapters.methods.beside import WHOLE
from mlx_adapters.methods.biases import BiasLayer, bias_of, shifted
from mlx_adapters.methods.dropout import Dropout
from mlx_adapters.methods.low_rank import SHARED_FIELDS, LowRank
from mlx_adapters.methods.modules import EMBEDDINGS, EmbeddingLayer
from mlx_adapters.methods.peft_fields import Fields
from mlx_adapters.methods.tokens import HeadTokens, TokenRows
from mlx_adapters.models import sites


class Layer(AdapterLayer):
    """A linear layer whose rows have a learned direction and length; x is [.., in], the result [.., out]."""

    # transformers reads only the form with .weight; PEFT writes the one without
    TENSORS: ClassVar[dict[str, str]] = {
        "lora_a": "lora_A.weight",
        "lora_b": "lora_B.weight",
        "magnitude": "lora_magnitude_vector.weight",
        "bias": "base_layer.bias",
    }
    ALIASES: ClassVar[dict[str, str]] = {"magnitude": "lora_magnitude_vector"}
    READS_WEIGHT: ClassVar[bool] = True

    def __init__(
        self, base: nn.Module, *, rank: int, scale: float, dropout: float, bias: bool = False
    ) -> None:
        super().__init__()
        in_dims, out_dims = dims(base)
        self.base = base
        self.scale = scale
        self.dropout = Dropout(dropout)
        bound = 1 / math.sqrt(in_dims)
        self.lora_a = mx.random.uniform(-bound, bound, (rank, in_dims))
        self.lora_b = mx.zeros((out_dims, rank))
        # a leading underscore keeps it out of the parameters: it follows from the base
        self._rows = plain_weight(base).astype(mx.float32).square().sum(axis=1)
        self.magnitude = mx.sqrt(self._rows)
        if bias and "bias" in base:
            self.bias = bias_of(base)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        dropped = self.dropout(x)
        # as in PEFT the update sees the dropped input, and with it the base's share of the correction
        plain = y if dropped is x else self.base(dropped)
        if "bias" in self.base:
            plain = plain - self.base.bias
        gain = self.magnitude / mx.stop_gradient(self._norm())
        low = (dropped @ self.lora_a.T) * self.scale
        y = y + ((gain - 1) * plain + gain * (low @ self.lora_b.T)).astype(y.dtype)
        return shifted(y, self.bias, self.base) if "bias" in self else y

    def _norm(self) -> mx.array:
        """||W + scale * B A|| of each row, [out]."""
        a, b = self.lora_a, self.lora_b
        product = self.base(a)  # A W^T, [rank, out]
        if "bias" in self.base:
            product = product - self.base.bias
        cross = (product.astype(mx.float32).T * b).sum(axis=1)
        update = ((b @ (a @ a.T)) * b).sum(axis=1)
        return mx.sqrt(self._rows + 2 * self.scale * cross + self.scale**2 * update)

    def merge(self) -> nn.Module:
        """A plain linear layer with the weight m * V / ||V||, in float32."""
        v = plain_weight(self.base).astype(mx.float32) + self.scale * (self.lora_b @ self.lora_a)
        weight = (self.magnitude / mx.linalg.norm(v, axis=1))[:, None] * v
        return linear_like(self.base, weight, self.get("bias"))


class OnTable(EmbeddingLayer):
    """An embedding whose columns have a learned length: m * V / ||V||, V = E + scale * (B A)^T.

    A [rank, vocabulary] starts at zero, B [width, rank] at random. A tied output head stays the base's.
    """

    TENSORS: ClassVar[dict[str, str]] = {
        **EmbeddingLayer.TENSORS,
        "magnitude": "lora_magnitude_vector.weight",
    }
    ALIASES: ClassVar[dict[str, str]] = Layer.ALIASES
    READS_WEIGHT: ClassVar[bool] = True

    def __init__(self, base: nn.Module, *, rank: int, scale: float, tied: bool) -> None:
        super().__init__(base, rank=rank, scale=scale, tied=tied)
        self.magnitude = mx.linalg.norm(plain_weight(base).astype(mx.float32), axis=0)

    def __call__(self, ids: mx.array) -> mx.array:
        y = self.base(ids)
        gain = self.magnitude / mx.stop_gradient(mx.linalg.norm(super().table(), axis=0))
        low = (self.lora_embedding_a.T[ids] * self.scale) @ self.lora_embedding_b.T
        return y + ((gain - 1) * y + gain * low).astype(y.dtype)

    def table(self) -> mx.array:
        """The embedding's weight as trained, float32 [vocabulary, width]."""
        table = super().table()
        return table * (self.magnitude / mx.linalg.norm(table, axis=0))


class DoRA(LowRank):
    """DoRA: weight-decomposed low-rank adaptation. Liu et al. 2024, https://arxiv.org/abs/2402.09353

        y = m * (V / ||V||) x,    V = W + scale * B A,    scale = alpha / rank

    m [out] holds the length of each row, ||V|| is taken row by row and is a constant in the gradient (section
    4.3 of the paper). m starts at ||W|| and B at zero: a fresh adapter is the base. V is never formed:

        y = W x + (g - 1) W x + g * scale * B A x,    g = m / ||V||
        ||V||^2 = ||W||^2 + 2 scale (W A^T * B) + scale^2 (B A A^T * B),    summed over each row

    and W A^T is the base layer applied to the rows of A, so a quantized W is not written out for it.
    """

    NAME = "dora"
    TITLE = "DoRA: weight-decomposed low-rank adaptation"
    AUTHORS = "Liu et al. 2024"
    PAPER = "https://arxiv.org/abs/2402.09353"
    PEFT_TYPE = "LORA"
    PEFT_FIELDS = {**SHARED_FIELDS, "use_dora": (True,)}
    LAYERS = (Layer, OnTable, *WHOLE, TokenRows, HeadTokens, BiasLayer)

    targets: str = field("default", TARGETS_HELP)
    layers: str = field("all", LAYERS_HELP)

    def place_layers(self, model: nn.Module, model_type: str, paths: list[str] | None) -> Placed:
        """A layer on each chosen linear layer, and on the embedding where a file has one."""
        modules = dict(model.named_modules())
        if paths is None:
            paths = resolve_targets(
                model, model_type, targets=self.targets, layers=self.layers, default="lora"
            )
            self.all_matched([sites.to_hf(path, model_type) for path in paths])
        placed: Placed = {}
        for path in paths:
            base, (rank, scale) = modules[path], self.at(sites.to_hf(path, model_type))
            if isinstance(base, EMBEDDINGS):
                placed[path] = OnTable(base, rank=rank, scale=scale, tied=sites.tied(model))
            else:
                own = self.bias != "none"
                placed[path] = Layer(base, rank=rank, scale=scale, dropout=self.dropout, bias=own)
        return placed

    @classmethod
    def claims(cls, fields: Fields) -> bool:
        """Whether a LoRA configuration of PEFT is DoRA."""
        return bool(fields.get("use_dora"))

    def to_peft(self) -> Fields:
        return {**super().to_peft(), "use_dora": True}

    @classmethod
    def from_peft(cls, fields: Fields) -> Self:
        return cls(**cls.read_peft(fields))
