"""ChatGLM-6B, the first one, which mlx-lm lacks. Du et al. 2021 (GLM), https://arxiv.org/abs/2103.10360, Zeng
et al. 2022 (GLM-130B), https://arxiv.org/abs/2210.02414, and the checkpoint's own description,
https://github.com/THUDM/ChatGLM-6B

A text is `context, [gMASK], <sop>, answer`. The context with the mask sees itself both ways, the answer looks
back. A token has two positions, each turning one half of every head: in the context its place and 0, from
<sop> on the place of the mask and 1, 2, 3 ... Until <sop> has been read, everything is context.

    x = a norm(x) + attention(norm(x)),   x = a norm(x) + mlp(norm(x)),   a = sqrt(2 layers)

The rotations' frequencies are rounded to float16, as the checkpoint's code stores them. Module names are the
checkpoint's.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache

from mlx_adapters.errors import UnsupportedError

__all__ = ["ContextCache", "Model", "ModelArgs"]

_NEVER = 1 << 30  # a place that no text reaches


@dataclass
class ModelArgs(BaseModelArgs):
    """The fields of `config.json` that change the function."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    bos_token_id: int = 130004
    inner_hidden_size: int | None = None
    layernorm_epsilon: float = 1e-5
    gmask_token_id: int | None = None
    mask_token_id: int | None = None
    position_encoding_2d: bool = True
    max_sequence_length: int = 2048

    def __post_init__(self) -> None:
        self.inner_hidden_size = self.inner_hidden_size or 4 * self.hidden_size
        # the first release names neither: [MASK], [gMASK], [sMASK], an unused one and <sop> follow each other
        if self.gmask_token_id is None:
            self.gmask_token_id = self.bos_token_id - 3
        if self.mask_token_id is None:
            self.mask_token_id = self.bos_token_id - 4


class Seen(NamedTuple):
    """Where each row has its first <sop>, [gMASK] and [MASK], [rows]; `_NEVER` until then."""

    start: mx.array
    gmask: mx.array
    mask: mx.array


class ContextCache(KVCache):
    """Keys and values of a text whose context must be read at once, or token by token to its end: it sees
    itself both ways, so it cannot be cut back, and rows do not share it."""

    seen: Seen | None = None

    def is_trimmable(self) -> bool:
        """Never."""
        return False

    @classmethod
    def merge(cls, caches: Any) -> Any:
        """Not offered."""
        raise NotImplementedError("rows of this model are read one by one")


class Attention(nn.Module):
    """Self-attention; x is [rows, time, width], `turns` the cosines and sines of both positions."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        width = args.hidden_size
        self.heads, self.size = args.num_attention_heads, width // args.num_attention_heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def __call__(self, x: mx.array, turns: Any, mask: mx.array, cache: Any = None) -> mx.array:
        rows, time, width = x.shape
        fused = self.query_key_value(x).reshape(rows, time, self.heads, 3 * self.size)
        queries, keys, values = (part.transpose(0, 2, 1, 3) for part in mx.split(fused, 3, axis=-1))
        queries, keys = _turned(queries, turns), _turned(keys, turns)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        y = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.size**-0.5, mask=mask)
        return self.dense(y.transpose(0, 2, 1, 3).reshape(rows, time, width))


def _turned(x: mx.array, turns: list[tuple[mx.array, mx.array]]) -> mx.array:
    """x [rows, heads, time, size]: each half of a head turns by its own position."""
    parts = []
    for half, (cos, sin) in zip(mx.split(x, 2, axis=-1), turns, strict=True):
        one, two = mx.split(half, 2, axis=-1)
        parts += [one * cos - two * sin, two * cos + one * sin]
    return mx.concatenate(parts, axis=-1).astype(x.dtype)


class MLP(nn.Module):
    """Two layers without a gate."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        inner = args.inner_hidden_size or 0
        self.dense_h_to_4h = nn.Linear(args.hidden_size, inner)
        self.dense_4h_to_h = nn.Linear(inner, args.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.dense_4h_to_h(nn.gelu_approx(self.dense_h_to_4h(x)))


class Block(nn.Module):
    """A block, whose residual connections start behind the norms and are scaled."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.alpha = math.sqrt(2 * args.num_layers)
        self.input_layernorm = nn.LayerNorm(args.hidden_size, eps=args.layernorm_epsilon)
        self.attention = Attention(args)
        self.post_attention_layernorm = nn.LayerNorm(args.hidden_size, eps=args.layernorm_epsilon)
        self.mlp = MLP(args)

    def __call__(self, x: mx.array, turns: Any, mask: mx.array, cache: Any = None) -> mx.array:
        normed = self.input_layernorm(x)
        x = normed * self.alpha + self.attention(normed, turns, mask, cache)
        normed = self.post_attention_layernorm(x)
        return normed * self.alpha + self.mlp(normed)


class Backbone(nn.Module):
    """The checkpoint's `transformer`: token ids to hidden states."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.word_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_layers)]
        self.final_layernorm = nn.LayerNorm(args.hidden_size, eps=args.layernorm_epsilon)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        cache = cache or [None] * len(self.layers)
        before = 0 if cache[0] is None else cache[0].offset
        if not isinstance(before, int):
            raise NotImplementedError("rows of different lengths are read one by one")
        seen = self._look(inputs, before, getattr(cache[0], "seen", None))
        if cache[0] is not None:
            cache[0].seen = seen
        x = self.word_embeddings(inputs)
        places = mx.arange(before, before + inputs.shape[1])[None]
        answers = places >= seen.start[:, None]  # the rest is context
        last = mx.where(seen.gmask < _NEVER, seen.gmask, seen.mask)
        last = mx.where(last < _NEVER, last, seen.start - 1)
        first = mx.where(answers, last[:, None], places)
        second = mx.where(answers, places - seen.start[:, None] + 1, 0)
        turns = [self._turn(first), self._turn(second)]
        keys = mx.arange(before + inputs.shape[1])
        mask = (keys <= places[..., None]) | (keys < seen.start[:, None, None])
        for block, past in zip(self.layers, cache, strict=True):
            x = block(x, turns, mask[:, None], past)
        return self.final_layernorm(x)

    def _look(self, inputs: mx.array, before: int, seen: Seen | None) -> Seen:
        """What was seen, and what `inputs` [rows, time] hold; `before` tokens were read."""
        found = []
        for number, token in enumerate(
            (self.args.bos_token_id, self.args.gmask_token_id, self.args.mask_token_id)
        ):
            here = inputs == token
            place = mx.where(here.any(axis=1), mx.argmax(here, axis=1) + before, _NEVER)
            found.append(place if seen is None else mx.minimum(seen[number], place))
        return Seen(*found)

    def _turn(self, positions: mx.array) -> tuple[mx.array, mx.array]:
        """Cosines and sines [rows, 1, time, size / 4] of positions [rows, time]."""
        size = self.args.hidden_size // self.args.num_attention_heads // 2
        frequencies = (10000.0 ** (-mx.arange(0, size, 2) / size)).astype(mx.float16).astype(mx.float32)
        angles = positions[:, None, :, None] * frequencies
        return mx.cos(angles), mx.sin(angles)


class Model(nn.Module):
    """ChatGLM-6B with its output head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        if not args.position_encoding_2d:
            raise UnsupportedError("config.json: field 'position_encoding_2d' is false: not ChatGLM-6B")
        self.args = args
        self.model_type = args.model_type
        self.model = Backbone(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        return self.lm_head(self.model(inputs, cache))

    def make_cache(self) -> list[ContextCache]:
        """An empty cache for each block."""
        return [ContextCache() for _ in self.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The checkpoint's names as the modules here have them, without its tables of rotations."""
        return {
            "model." + name.removeprefix("transformer.") if name.startswith("transformer.") else name: array
            for name, array in weights.items()
            if not name.endswith("rotary_emb.inv_freq")
        }

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks."""
        return self.model.layers
