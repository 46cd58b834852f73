"""PEFT's trainable tokens: some rows of the embedding, or of the output head, are trained and replaced."""

from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import AdapterError, ConfigError
from mlx_adapters.methods.base import AdapterLayer, OnEmbedding, dims, linear_like, plain_weight

__all__ = ["HeadTokens", "TokenRows", "as_text", "parse"]

ALL = ""
"""The name of the token embedding where no name is given."""


def parse(text: str) -> dict[str, list[int]]:
    """{name of the module: ids of tokens}; ConfigError where the text is not written so."""
    found: dict[str, list[int]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, _, ids = part.rpartition("=")
        try:
            found[name.strip()] = [int(number) for number in ids.split(",")]
        except ValueError:
            raise ConfigError(
                f"trainable_tokens={text!r}: write ids of tokens, 4,9, or embed_tokens=4,9;lm_head=4,9"
            ) from None
    for name, numbers in found.items():
        if min(numbers) < 0 or len(set(numbers)) < len(numbers):
            raise ConfigError(f"trainable_tokens: {name or 'the list'} holds an id twice, or one below 0")
    return found


def as_text(value: Any) -> str:
    """PEFT's `trainable_token_indices`, a list of ids or {name: ids}, as `parse` reads it."""
    named = value if isinstance(value, dict) else {ALL: value or []}
    if not all(isinstance(ids, list) and all(type(one) is int for one in ids) for ids in named.values()):
        raise AdapterError(f"trainable_token_indices={value!r} is not a list of token ids, nor such by name")
    parts = {name: ",".join(map(str, ids)) for name, ids in named.items() if ids}
    return ";".join(f"{name}={ids}" if name else ids for name, ids in parts.items())


class _Index:
    """Where the row of a token is. A plain object: its arrays are no parameters."""

    def __init__(self, ids: list[int], vocabulary: int) -> None:
        if max(ids) >= vocabulary:
            raise ConfigError(f"trainable_tokens: {max(ids)} is no token of this model: it has {vocabulary}")
        place = [0] * vocabulary
        for number, token in enumerate(ids):
            place[token] = number + 1
        self.row = mx.array(place)  # 0: not trained
        self.column = mx.array([vocabulary + n - 1 if n else token for token, n in enumerate(place)])
        self.ids = mx.array(ids)

    def replaced(self, logits: mx.array, own: mx.array) -> mx.array:
        """`logits` [.., vocabulary] with those of the trained tokens, `own` [.., n], in their places."""
        return mx.concatenate([logits, own.astype(logits.dtype)], axis=-1)[..., self.column]

    def table(self, base: nn.Module, rows: mx.array) -> mx.array:
        """The whole weight."""
        weight = plain_weight(base)
        trained = rows[mx.maximum(self.row - 1, 0)].astype(weight.dtype)
        return mx.where((self.row > 0)[:, None], trained, weight)


class TokenRows(OnEmbedding):
    """The token embedding with rows [n, width] of its own for n tokens; a tied output head has them too."""

    TENSORS: ClassVar[dict[str, str]] = {"rows": "token_adapter.trainable_tokens_delta"}
    TARGET: ClassVar[bool] = False

    def __init__(self, base: nn.Module, ids: list[int]) -> None:
        super().__init__()
        self.base = base
        self.index = _Index(ids, dims(base)[1])
        self.rows = mx.array(plain_weight(base)[self.index.ids]).astype(mx.float32)

    @property
    def weight(self) -> mx.array:
        """The table with the trained rows."""
        return self.index.table(self.base, self.rows)

    def __call__(self, ids: mx.array) -> mx.array:
        y = self.base(ids)
        number = self.index.row[ids]
        return mx.where((number > 0)[..., None], self.rows[mx.maximum(number - 1, 0)].astype(y.dtype), y)

    def as_linear(self, x: mx.array) -> mx.array:
        """A tied head, with the trained rows."""
        return self.index.replaced(self.base.as_linear(x), x @ self.rows.T.astype(x.dtype))

    def merge(self) -> nn.Module:
        """A plain embedding with the trained rows."""
        merged = nn.Embedding(1, 1)
        merged.weight = self.index.table(self.base, self.rows).astype(mx.float32)
        return merged


class HeadTokens(AdapterLayer):
    """An output head, not tied, with rows [n, width] of its own for n tokens."""

    TENSORS: ClassVar[dict[str, str]] = TokenRows.TENSORS
    TARGET: ClassVar[bool] = False

    def __init__(self, base: nn.Module, ids: list[int]) -> None:
        super().__init__()
        self.base = base
        self.index = _Index(ids, dims(base)[1])
        self.rows = mx.array(plain_weight(base)[self.index.ids]).astype(mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        return self.index.replaced(self.base(x), x @ self.rows.T.astype(x.dtype))

    def merge(self) -> nn.Module:
        """A plain linear layer with the trained rows."""
        return linear_like(self.base, self.index.table(self.base, self.rows).astype(mx.float32))
