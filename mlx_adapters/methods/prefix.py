"""Prefix tuning's layer and options."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import ConfigError, UnsupportedError, unknown
from mlx_adapters.fields import field
from mlx_adapters.methods import prompt
from mlx_adapters.methods.base import Layers, Method, Placed
from mlx_adapters.methods.peft_fields import Fields
from mlx_adapters.models import limits

INITS = ("activations", "random")


class Layer(prompt.PromptTable):
    """An attribute of the model; the table is [n, layers * 2 * kv_heads * head_dim], keys before values."""

    ENCODER: ClassVar[tuple[str, ...]] = ("encoder",)

    def __init__(self, table: mx.array | None, encoder: nn.Module | None, *, keys: "Keys") -> None:
        super().__init__()
        if table is not None:
            self.table = table
        if encoder is not None:
            self.encoder = encoder
        self.keys = keys

    def encoded(self) -> mx.array:
        return self.encoder()

    def start_cache(self, model: nn.Module, rows: int) -> list[Any]:
        from mlx_lm.models.cache import make_prompt_cache

        layers, heads, width = self.keys.layers, self.keys.heads, self.keys.width
        table = self.now().astype(self.keys.dtype)
        count = table.shape[0]
        # [n, layers, 2, heads, width] -> [layers, 2, heads, n, width]
        states = table.reshape(count, layers, 2, heads, width).transpose(1, 2, 3, 0, 4)
        caches: list[Any] = make_prompt_cache(model)
        for layer, cache in enumerate(caches):
            cache.keys, cache.values = (
                mx.broadcast_to(states[layer, which][None], (rows, heads, count, width)) for which in (0, 1)
            )
            cache.offset = count
        return caches


@dataclass(frozen=True)
class Keys:
    """The shape of a model's keys (and values, which must share it)."""

    layers: int
    heads: int
    width: int
    dtype: mx.Dtype


class Projection(nn.Module):
    """embedding [n, token] -> tanh MLP -> [n, layers * 2 * token], token = kv_heads * head_dim."""

    def __init__(self, count: int, token: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.seeds = mx.random.normal((count, token))
        self.into, self.out_of = nn.Linear(token, hidden), nn.Linear(hidden, layers * 2 * token)

    def __call__(self) -> mx.array:
        return self.out_of(mx.tanh(self.into(self.seeds)))


class Prefix(Method):
    """Prefix tuning: keys and values of n virtual tokens in every layer. Li & Liang 2021,
    https://arxiv.org/abs/2101.00190; without a network behind them P-tuning v2,
    https://arxiv.org/abs/2110.07602

        attention(q, [K_P, K], [V_P, V])    in each layer; K_P is not rotated, the text stands at position n

    In MLX a prefix is a cache that starts full, so models need not know of it. With `projection` the keys and
    values are the output of an embedding and a two-layer tanh MLP. Only they are saved, as in PEFT:
    training a loaded adapter further trains the keys and values; a resumed run continues with the MLP.
    """

    NAME = "prefix"
    TITLE = "Prefix tuning: keys and values of n virtual tokens in every layer"
    AUTHORS = "Li & Liang 2021"
    PAPER = "https://arxiv.org/abs/2101.00190"
    PEFT_TYPE = "PREFIX_TUNING"
    PEFT_FIELDS = {
        **prompt.SHAPE_FIELDS,
        **dict.fromkeys(("encoder_hidden_size", "prefix_projection", "init_weights")),
    }
    AUTO_MODEL = False  # transformers' load_adapter refuses prompt learning; PeftModel opens it
    LAYERS = (Layer,)
    STANDS_ON = "the cache"

    num_virtual_tokens: int = field(10, "how many keys and values are learned in each layer")
    projection: bool = field(False, "through an embedding and a two-layer MLP")
    encoder_hidden_size: int | None = field(None, "width of that MLP [default: the keys' width]")
    init: str = field("activations", "activations: keys and values of sampled words; random: normal(0, 1)")

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise ConfigError(f"prefix: num_virtual_tokens={self.num_virtual_tokens} must be at least 1")
        if self.encoder_hidden_size is not None and self.encoder_hidden_size < 1:
            raise ConfigError(f"prefix: encoder_hidden_size={self.encoder_hidden_size} must be at least 1")
        if self.init not in INITS:
            raise ConfigError("prefix: " + unknown("init", self.init, INITS))

    def place(self, model: nn.Module, model_type: str, paths: list[str] | None = None) -> Placed:
        """A new attribute of the model, which changes nothing but the cache it starts with."""
        vocabulary = 2 if self.projection or self.init == "random" else None
        count = self.num_virtual_tokens
        states, keys = _activations(model, model_type, count, vocabulary)
        token = keys.heads * keys.width
        if self.projection:
            hidden = self.encoder_hidden_size or token
            return {"prefix": Layer(None, Projection(count, token, hidden, keys.layers), keys=keys)}
        table = mx.random.normal((count, keys.layers * 2 * token)) if self.init == "random" else states
        return {"prefix": Layer(table, None, keys=keys)}

    def to_peft(self) -> Fields:
        return {"num_virtual_tokens": self.num_virtual_tokens, "prefix_projection": self.projection}

    def peft_extra(self, layers: Layers, model: nn.Module, model_type: str) -> Fields:
        """The sizes that PEFT wants to know; its attention heads are those of the keys."""
        layer = next(iter(layers.values()))
        keys: Keys = layer.keys
        token = keys.heads * keys.width
        hidden = token if "table" in layer else layer.encoder.into.weight.shape[0]
        return {
            **prompt.shape_fields(model),
            "token_dim": token,
            "num_attention_heads": keys.heads,
            "encoder_hidden_size": hidden,
        }

    @classmethod
    def from_peft(cls, fields: Fields) -> Self:
        """The saved keys and values are projected already."""
        return cls(
            num_virtual_tokens=prompt.virtual_tokens(fields),
            projection=bool(fields.get("prefix_projection")),
            encoder_hidden_size=fields.get("encoder_hidden_size"),
            init="random",
        )


def _activations(
    model: nn.Module, model_type: str, count: int, vocabulary: int | None
) -> tuple[mx.array, Keys]:
    """(table of the keys and values that `count` sampled words have, their shape)."""
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    caches = make_prompt_cache(model)
    odd = sorted({type(cache).__name__ for cache in caches if not isinstance(cache, KVCache)})
    if odd:
        raise UnsupportedError(
            f"prefix: a {model_type} model has layers that keep {', '.join(odd)} instead of all keys and "
            "values (a sliding window, or no attention), where a prefix would be lost. Use lora or prompt"
        )
    vocabulary = vocabulary or limits.vocabulary(model) or 2
    model(mx.random.randint(0, vocabulary, (1, count)), cache=caches)
    states = [state[0, :, :count] for cache in caches for state in (cache.keys, cache.values)]
    if len({state.shape for state in states}) != 1:
        raise UnsupportedError(f"prefix: the keys and values of a {model_type} model differ in shape")
    heads, _, width = states[0].shape
    # each [heads, n, width] -> [n, heads * width], side by side
    flat = [state.transpose(1, 0, 2).reshape(count, heads * width) for state in states]
    table = mx.concatenate(flat, axis=1).astype(mx.float32)
    return table, Keys(len(caches), heads, width, states[0].dtype)
