"""NEFTune: uniform noise on the input embeddings while training. Jain et al. 2023, https://arxiv.org/abs/2310.05914

E(x) + u,   u ~ Uniform(-1, 1) * alpha / sqrt(length * width)
"""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import UnsupportedError
from mlx_adapters.models import sites
from mlx_adapters.rebind import replace_call

__all__ = ["add_noise"]


def add_noise(model: nn.Module, alpha: float) -> None:
    """Let the token embedding of `model` (not its class) add noise in training mode.

    `length` is that of the padded batch, as in the authors' code. Raises UnsupportedError where an adapter
    stands on the embedding.
    """
    try:
        path = sites.embedding(model)
    except UnsupportedError:
        raise UnsupportedError("neftune: there is no bare token embedding to add noise to. Use 0") from None
    table = dict(model.named_modules())[path]
    base = type(table)

    def call(self: Any, ids: mx.array) -> mx.array:
        embedded: mx.array = base.__call__(self, ids)
        if not self.training:
            return embedded
        bound = alpha / math.sqrt(embedded.shape[-2] * embedded.shape[-1])
        return embedded + mx.random.uniform(-bound, bound, embedded.shape).astype(embedded.dtype)

    table.__class__ = replace_call(base, call)
