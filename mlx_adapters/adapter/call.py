"""The one way to call a model, and the virtual tokens that prompt-side adapters put before a text.

Prompt tuning and P-tuning put token ids in front that only their embedding layer understands; prefix tuning
gives a cache that starts full. Everything here does nothing for other adapters, so training, evaluation and
generation call models through this file whatever the method is.

Some models compute another function without a cache (gemma3n's last layers look up the keys of earlier ones
in it): they are found by trying, and always get one.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.device import rounding
from mlx_adapters.methods.base import AdapterLayer
from mlx_adapters.models import limits

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

__all__ = [
    "all_with_virtual",
    "apart",
    "before_text",
    "call_model",
    "close",
    "needs_cache",
    "start_cache",
    "virtual_ids",
    "with_virtual",
]

_PROBE = [[1, 2, 3, 4]]


def virtual_ids(model: nn.Module) -> list[int]:
    """Token ids to put in front of every row; empty for most adapters."""
    return [token for layer in _layers(model) for token in layer.virtual_ids()]


def with_virtual(
    model: nn.Module, row: Sequence[int], tokenizer: "TokenizerWrapper | None" = None
) -> list[int]:
    """A row of token ids as the model wants it. Raises CheckpointError for an id that the model does not
    have, which a `tokenizer` names."""
    return all_with_virtual(model, [row], tokenizer)[0]


def all_with_virtual(
    model: nn.Module, rows: Iterable[Sequence[int]], tokenizer: "TokenizerWrapper | None" = None
) -> list[list[int]]:
    """`with_virtual` of many rows. The model's layers are walked once: that takes a millisecond."""
    front, rows = virtual_ids(model), list(rows)
    limits.check_ids(model, rows, tokenizer)
    return [[*front, *row] for row in rows]


def before_text(model: nn.Module) -> int:
    """How many places stand before a text: virtual tokens, or the keys of a prefix."""
    cache = start_cache(model)
    return len(virtual_ids(model)) + (int(cache[0].offset) if cache else 0)


def start_cache(model: nn.Module, rows: int = 1) -> list[Any] | None:
    """A cache for `rows` rows that starts full; None where an empty one will do."""
    caches = [cache for layer in _layers(model) if (cache := layer.start_cache(model, rows)) is not None]
    return caches[0] if caches else None


def call_model(
    model: nn.Module,
    ids: mx.array,
    *,
    backbone: Callable[..., mx.array] | None = None,
    cache: list[Any] | None = None,
) -> mx.array:
    """`model(ids)` for whole texts `ids` [rows, time] with the adapter's virtual tokens in front.

    The result [rows, time, ...] is the text's: positions of virtual tokens are cut off. `backbone` is called
    in the model's place, to get hidden states; `cache` stands in for the adapter's. One that has read
    something holds the virtual tokens too.
    """
    call = backbone or model
    front = virtual_ids(model)
    if front and cache and not cache[0].empty():
        front = []
    if front:
        ids = mx.concatenate([mx.broadcast_to(mx.array(front), (ids.shape[0], len(front))), ids], axis=1)
    rows = ids.shape[0]
    cache = cache or start_cache(model, rows) or (_empty_cache(model) if needs_cache(model, rows) else None)
    out: mx.array = call(ids, cache=cache)  # also None: some backbones have no default for it
    return out[:, len(front) :]


def needs_cache(model: nn.Module, rows: int = 1) -> bool:
    """Whether a text that is read at once needs an empty cache to be read as in generation.

    Tried once per model, on a short text (of so many `rows`, where each has an adapter of its own); call it
    before a function that is traced calls `call_model`.
    """
    known: bool | None = getattr(model, "_needs_cache", None)
    if known is None:
        training = model.training
        model.eval()  # dropout would tell the two apart
        probe = mx.array(_PROBE * rows)
        plain, cached = model(probe), model(probe, cache=_empty_cache(model))
        known = model._needs_cache = not close(plain, cached)
        model.train(training)
    return known


def close(found: mx.array, expected: mx.array) -> bool:
    """Whether two ways to compute the same logits agree but for rounding. A model may rule tokens out."""
    return apart(found, expected) <= rounding(expected.dtype)


def apart(found: mx.array, expected: mx.array) -> float:
    """The largest difference of two arrays of logits, in parts of the largest one."""
    ruled_out = mx.isneginf(expected) & mx.isneginf(found)
    found, expected = (mx.where(ruled_out, 0, x).astype(mx.float32) for x in (found, expected))
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


def _empty_cache(model: nn.Module) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    cache: list[Any] = make_prompt_cache(model)
    return cache


def _layers(model: nn.Module) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]
