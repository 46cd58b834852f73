"""GPT-Neo, which mlx-lm lacks. Black et al. 2021, https://doi.org/10.5281/zenodo.5297715

Blocks attend to everything before or to the last `window_size` tokens, in the order that the config gives.
Scores are not divided by the root of the head's size. Module names are the checkpoint's behind `transformer.`
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention

from mlx_adapters.errors import UnsupportedError
from mlx_adapters.models.activations import activation
from mlx_adapters.models.positions import positions

__all__ = ["Model", "ModelArgs"]


@dataclass
class ModelArgs(BaseModelArgs):
    """The fields of `config.json` that change the function."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int = 2048
    attention_types: list[Any] | None = None
    attention_layers: list[str] | None = None
    intermediate_size: int | None = None
    window_size: int = 256
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    @property
    def kinds(self) -> list[str]:
        """`global` or `local` for each block."""
        types = self.attention_types or [[["global", "local"], 12]]
        expanded = [kind for names, times in types for _ in range(times) for kind in names]
        kinds = self.attention_layers or expanded  # transformers believes the list where both are given
        if len(kinds) != self.num_layers or not set(kinds) <= {"global", "local"}:
            name = "attention_layers" if self.attention_layers else "attention_types"
            raise UnsupportedError(
                f"config.json: field {name!r} gives {len(kinds)} blocks ({sorted(set(kinds))}), and "
                f"should give {self.num_layers} that are global or local"
            )
        return kinds


class SelfAttention(nn.Module):
    """Self-attention; x is [rows, time, width]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.heads = args.num_heads
        self.q_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=False)
        self.k_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=False)
        self.v_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=False)
        self.out_proj = nn.Linear(args.hidden_size, args.hidden_size)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        rows, time, width = x.shape
        queries, keys, values = (
            project(x).reshape(rows, time, self.heads, -1).transpose(0, 2, 1, 3)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        y = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=1.0, mask=mask)
        return self.out_proj(y.transpose(0, 2, 1, 3).reshape(rows, time, width))


class Attention(nn.Module):
    """The checkpoint puts one more name around the attention."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention = SelfAttention(args)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        return self.attention(x, mask, cache)


class MLP(nn.Module):
    """Two linear layers with the config's activation between them."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        inner = args.intermediate_size or 4 * args.hidden_size
        self.c_fc = nn.Linear(args.hidden_size, inner)
        self.c_proj = nn.Linear(inner, args.hidden_size)
        self.act = activation("activation_function", args.activation_function)

    def __call__(self, x: mx.array) -> mx.array:
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    """A decoder block."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)
        self.attn = Attention(args)
        self.ln_2 = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)
        self.mlp = MLP(args)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class Backbone(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.kinds, self.window, self.limit = args.kinds, args.window_size, args.max_position_embeddings
        self.wte = nn.Embedding(args.vocab_size, args.hidden_size)
        self.wpe = nn.Embedding(args.max_position_embeddings, args.hidden_size)
        self.h = [Block(args) for _ in range(args.num_layers)]
        self.ln_f = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        cache = cache or [None] * len(self.h)
        x = self.wte(inputs) + self.wpe(positions(inputs, cache[0], self.limit))
        masks = {"global": create_attention_mask(x, cache[0])}
        if "local" in self.kinds:
            masks["local"] = create_attention_mask(x, cache[0], window_size=self.window, return_array=True)
        for kind, block, past in zip(self.kinds, self.h, cache, strict=True):
            x = block(x, masks[kind], past)
        return self.ln_f(x)


class Model(nn.Module):
    """GPT-Neo with its output head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Backbone(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        x = self.model(inputs, cache)
        return self.model.wte.as_linear(x) if self.args.tie_word_embeddings else self.lm_head(x)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The checkpoint's names as the modules here have them, without its masks."""
        named = {}
        for name, array in weights.items():
            if name.endswith((".attn.attention.bias", ".attn.attention.masked_bias")):
                continue
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
