"""OPT, which mlx-lm lacks. Zhang et al. 2022, https://arxiv.org/abs/2205.01068

Learned positions start at row 2 of their table. The 350M model normalises after each sublayer instead of
before, and projects its narrower embeddings in and out. Module names are the checkpoint's.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention

from mlx_adapters.models.activations import activation
from mlx_adapters.models.positions import positions

__all__ = ["Model", "ModelArgs"]

_FIRST = 2


@dataclass
class ModelArgs(BaseModelArgs):
    """The fields of `config.json` that change the function."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    ffn_dim: int
    num_attention_heads: int
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int | None = None
    do_layer_norm_before: bool = True
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    activation_function: str = "relu"
    tie_word_embeddings: bool = True
    _remove_final_layer_norm: bool = False


def _norm(args: ModelArgs) -> nn.LayerNorm:
    return nn.LayerNorm(args.hidden_size, eps=1e-5, affine=args.layer_norm_elementwise_affine)


class Attention(nn.Module):
    """Self-attention; x is [rows, time, width]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        width, bias = args.hidden_size, args.enable_bias
        self.heads = args.num_attention_heads
        self.scale = (width // self.heads) ** -0.5
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        rows, time, width = x.shape
        queries, keys, values = (
            project(x).reshape(rows, time, self.heads, -1).transpose(0, 2, 1, 3)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        y = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.out_proj(y.transpose(0, 2, 1, 3).reshape(rows, time, width))


class Block(nn.Module):
    """A decoder block."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.norm_first = args.do_layer_norm_before
        self.self_attn = Attention(args)
        self.self_attn_layer_norm = _norm(args)
        self.fc1 = nn.Linear(args.hidden_size, args.ffn_dim, bias=args.enable_bias)
        self.fc2 = nn.Linear(args.ffn_dim, args.hidden_size, bias=args.enable_bias)
        self.final_layer_norm = _norm(args)
        self.act = activation("activation_function", args.activation_function)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if self.norm_first:
            x = x + self.self_attn(self.self_attn_layer_norm(x), mask, cache)
            return x + self.fc2(self.act(self.fc1(self.final_layer_norm(x))))
        x = self.self_attn_layer_norm(x + self.self_attn(x, mask, cache))
        return self.final_layer_norm(x + self.fc2(self.act(self.fc1(x))))


class Decoder(nn.Module):
    """Token ids to hidden states of the embeddings' width."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        narrow = args.word_embed_proj_dim or args.hidden_size
        self.limit = args.max_position_embeddings
        self.embed_tokens = nn.Embedding(args.vocab_size, narrow)
        self.embed_positions = nn.Embedding(args.max_position_embeddings + _FIRST, args.hidden_size)
        if narrow != args.hidden_size:
            self.project_in = nn.Linear(narrow, args.hidden_size, bias=False)
            self.project_out = nn.Linear(args.hidden_size, narrow, bias=False)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        if args.do_layer_norm_before and not args._remove_final_layer_norm:
            self.final_layer_norm = _norm(args)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        x = self.embed_tokens(inputs)
        if "project_in" in self:
            x = self.project_in(x)
        cache = cache or [None] * len(self.layers)
        x = x + self.embed_positions(positions(inputs, cache[0], self.limit) + _FIRST)
        mask = create_attention_mask(x, cache[0])
        for block, past in zip(self.layers, cache, strict=True):
            x = block(x, mask, past)
        if "final_layer_norm" in self:
            x = self.final_layer_norm(x)
        return self.project_out(x) if "project_out" in self else x


class Backbone(nn.Module):
    """The checkpoint's `model`, which holds a decoder and nothing else."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.decoder = Decoder(args)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        return self.decoder(inputs, cache)

    @property
    def embed_tokens(self) -> nn.Module:
        """The token embedding, which is the head too where the two are tied."""
        return self.decoder.embed_tokens


class Model(nn.Module):
    """OPT with its output head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Backbone(args)
        if not args.tie_word_embeddings:
            narrow = args.word_embed_proj_dim or args.hidden_size
            self.lm_head = nn.Linear(narrow, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        x = self.model(inputs, cache)
        return self.model.embed_tokens.as_linear(x) if self.args.tie_word_embeddings else self.lm_head(x)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The checkpoint's names as the modules here have them; the first checkpoints lack `model.`"""
        named = {("model." + n if n.startswith("decoder.") else n): a for n, a in weights.items()}
        if self.args.tie_word_embeddings:
            named.pop("lm_head.weight", None)
        return named

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder blocks."""
        return self.model.decoder.layers
