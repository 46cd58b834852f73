"""BLOOM, which mlx-lm lacks. BigScience 2022, https://arxiv.org/abs/2211.05100

Positions are ALiBi's: each head takes a slope times the distance off the scores (Press et al. 2021,
https://arxiv.org/abs/2108.12409). The rows of the fused projection are, head by head, [query, key, value].
Module names are the checkpoint's behind `transformer.`
"""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import (
    BaseModelArgs,
    create_attention_mask,
    create_causal_mask,
    scaled_dot_product_attention,
)

from mlx_adapters.models.positions import cached_keys

__all__ = ["Model", "ModelArgs"]


@dataclass
class ModelArgs(BaseModelArgs):
    """The fields of `config.json` that change the function."""

    model_type: str
    vocab_size: int
    hidden_size: int
    n_layer: int
    n_head: int
    layer_norm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    tie_word_embeddings: bool = True


def slopes(heads: int) -> list[float]:
    """ALiBi's slope of each head: a geometric series, with every other term of the next one where the number
    of heads is no power of two."""
    power = 2 ** math.floor(math.log2(heads))
    series = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    series += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return series


def alibi(heads: int, time: int, keys: int, mask: mx.array | str | None, dtype: mx.Dtype) -> mx.array:
    """Scores to add, [.., heads, time, keys]: minus slope times distance, with the mask in the same array.

    The queries are the last `time` of the `keys`. Masked places get a number that is finite even after a
    score is added: a row of which all is masked (padding) must not become NaN, in half precision either.
    """
    distance = mx.arange(keys)[None, :] - mx.arange(keys - time, keys)[:, None]
    bias = mx.array(slopes(heads))[:, None, None] * distance
    least = mx.finfo(dtype).min / 2
    if mask is None:
        return bias.astype(dtype)
    allowed: mx.array = create_causal_mask(time, keys - time) if isinstance(mask, str) else mask
    if allowed.dtype == mx.bool_:
        return mx.where(allowed, bias, least).astype(dtype)
    return mx.maximum(bias + allowed, least).astype(dtype)


class Attention(nn.Module):
    """Self-attention; x is [rows, time, width], `mask` what is added to the scores."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.heads = args.n_head
        self.scale = (args.hidden_size // args.n_head) ** -0.5
        self.query_key_value = nn.Linear(args.hidden_size, 3 * args.hidden_size)
        self.dense = nn.Linear(args.hidden_size, args.hidden_size)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        rows, time, width = x.shape
        fused = self.query_key_value(x).reshape(rows, time, self.heads, 3, -1).transpose(3, 0, 2, 1, 4)
        queries, keys, values = fused[0], fused[1], fused[2]
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        y = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.dense(y.transpose(0, 2, 1, 3).reshape(rows, time, width))


class MLP(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(args.hidden_size, 4 * args.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * args.hidden_size, args.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.dense_4h_to_h(nn.gelu_approx(self.dense_h_to_4h(x)))


class Block(nn.Module):
    """A decoder block."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)
        self.self_attention = Attention(args)
        self.post_attention_layernorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)
        self.mlp = MLP(args)
        self.residual_after_norm = args.apply_residual_connection_post_layernorm

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        normed = self.input_layernorm(x)
        x = (normed if self.residual_after_norm else x) + self.self_attention(normed, mask, cache)
        normed = self.post_attention_layernorm(x)
        return (normed if self.residual_after_norm else x) + self.mlp(normed)


class Backbone(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.heads = args.n_head
        self.word_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.word_embeddings_layernorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)
        self.h = [Block(args) for _ in range(args.n_layer)]
        self.ln_f = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        x = self.word_embeddings_layernorm(self.word_embeddings(inputs))
        cache = cache or [None] * len(self.h)
        # once for all blocks: an array of its own in each would be kept for the backward pass
        mask = create_attention_mask(x, cache[0])
        mask = alibi(self.heads, x.shape[1], cached_keys(cache[0]) + x.shape[1], mask, x.dtype)
        for block, past in zip(self.h, cache, strict=True):
            x = block(x, mask, past)
        return self.ln_f(x)


class Model(nn.Module):
    """BLOOM with its output head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Backbone(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        x = self.model(inputs, cache)
        if self.args.tie_word_embeddings:
            return self.model.word_embeddings.as_linear(x)
        return self.lm_head(x)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The checkpoint's names as the modules here have them; the first checkpoints have no prefix."""
        named = {}
        for name, array in weights.items():
            if name.startswith("lm_head."):
                if not self.args.tie_word_embeddings:
                    named[name] = array
            else:
                named["model." + name.removeprefix("transformer.").removeprefix("model.")] = array
        return named

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder blocks."""
        return self.model.h
