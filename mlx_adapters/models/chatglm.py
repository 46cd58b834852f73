"""ChatGLM2 and ChatGLM3, which mlx-lm lacks. Zeng et al. 2022 (GLM-130B), https://arxiv.org/abs/2210.02414,
and the checkpoints' own description, https://github.com/THUDM/ChatGLM2-6B

Half of each head's numbers is rotated, in neighbouring pairs. Keys and values have `multi_query_group_num`
heads. The MLP's first layer gives gate and value side by side. Module names are the checkpoint's behind
`transformer.`
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention

__all__ = ["Model", "ModelArgs"]


@dataclass
class ModelArgs(BaseModelArgs):
    """The fields of `config.json` that change the function."""

    model_type: str
    padded_vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    ffn_hidden_size: int
    kv_channels: int = 128
    multi_query_attention: bool = False
    multi_query_group_num: int = 1
    add_qkv_bias: bool = False
    add_bias_linear: bool = False
    rmsnorm: bool = True
    layernorm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    rope_ratio: float = 1.0
    tie_word_embeddings: bool = False


def _norm(args: ModelArgs) -> nn.Module:
    kind = nn.RMSNorm if args.rmsnorm else nn.LayerNorm
    return kind(args.hidden_size, eps=args.layernorm_epsilon)


class Attention(nn.Module):
    """Self-attention; x is [rows, time, width]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.heads, self.size = args.num_attention_heads, args.kv_channels
        self.groups = args.multi_query_group_num if args.multi_query_attention else self.heads
        self.grouped = args.multi_query_attention
        self.scale = self.size**-0.5
        width, inner = args.hidden_size, self.heads * self.size
        fused = inner + 2 * self.groups * self.size
        self.query_key_value = nn.Linear(width, fused, bias=args.add_bias_linear or args.add_qkv_bias)
        self.dense = nn.Linear(inner, width, bias=args.add_bias_linear)
        self.rope = nn.RoPE(self.size // 2, traditional=True, base=10000 * args.rope_ratio)

    def _split(self, fused: mx.array) -> list[mx.array]:
        """Queries, keys and values, each [rows, time, heads, size]."""
        rows, time, _ = fused.shape
        if self.grouped:
            inner, group = self.heads * self.size, self.groups * self.size
            parts = mx.split(fused, [inner, inner + group], axis=-1)
            return [part.reshape(rows, time, -1, self.size) for part in parts]
        return list(mx.split(fused.reshape(rows, time, self.heads, 3 * self.size), 3, axis=-1))

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        rows, time, _ = x.shape
        queries, keys, values = (part.transpose(0, 2, 1, 3) for part in self._split(self.query_key_value(x)))
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        y = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.dense(y.transpose(0, 2, 1, 3).reshape(rows, time, -1))


class MLP(nn.Module):
    """SwiGLU; the first layer's output is [gate, value]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(args.hidden_size, 2 * args.ffn_hidden_size, bias=args.add_bias_linear)
        self.dense_4h_to_h = nn.Linear(args.ffn_hidden_size, args.hidden_size, bias=args.add_bias_linear)

    def __call__(self, x: mx.array) -> mx.array:
        gate, value = mx.split(self.dense_h_to_4h(x), 2, axis=-1)
        return self.dense_4h_to_h(nn.silu(gate) * value)


class Block(nn.Module):
    """A decoder block."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.input_layernorm = _norm(args)
        self.self_attention = Attention(args)
        self.post_attention_layernorm = _norm(args)
        self.mlp = MLP(args)
        self.residual_after_norm = args.apply_residual_connection_post_layernorm

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        normed = self.input_layernorm(x)
        x = (normed if self.residual_after_norm else x) + self.self_attention(normed, mask, cache)
        normed = self.post_attention_layernorm(x)
        return (normed if self.residual_after_norm else x) + self.mlp(normed)


class Encoder(nn.Module):
    """The blocks and the norm behind them."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.layers = [Block(args) for _ in range(args.num_layers)]
        if args.post_layer_norm:
            self.final_layernorm = _norm(args)

    def __call__(self, x: mx.array, cache: Any = None) -> mx.array:
        cache = cache or [None] * len(self.layers)
        mask = create_attention_mask(x, cache[0])
        for block, past in zip(self.layers, cache, strict=True):
            x = block(x, mask, past)
        return self.final_layernorm(x) if "final_layernorm" in self else x


class Words(nn.Module):
    """The checkpoint puts one more name around the embedding."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(args.padded_vocab_size, args.hidden_size)

    def __call__(self, inputs: mx.array) -> mx.array:
        return self.word_embeddings(inputs)


class Backbone(nn.Module):
    """The checkpoint's `transformer`: token ids to hidden states; the output layer belongs to it by name."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embedding = Words(args)
        self.encoder = Encoder(args)
        if not args.tie_word_embeddings:
            self.output_layer = nn.Linear(args.hidden_size, args.padded_vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        return self.encoder(self.embedding(inputs), cache)

    @property
    def word_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embedding.word_embeddings


class Model(nn.Module):
    """ChatGLM with its output head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Backbone(args)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        x = self.model(inputs, cache)
        if self.args.tie_word_embeddings:
            return self.model.word_embeddings.as_linear(x)
        return self.model.output_layer(x)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The checkpoint's names as the modules here have them, without its table of rotations."""
        named = {
            "model." + name.removeprefix("transformer.").removeprefix("model."): array
            for name, array in weights.items()
            if not name.endswith("rotary_pos_emb.inv_freq")
        }
        if self.args.tie_word_embeddings:
            named.pop("model.output_layer.weight", None)
        return named

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder blocks."""
        return self.model.encoder.layers
