"""Positions of tokens for models that do not rotate: a table of learned ones, or ALiBi's distances."""

from typing import Any

import mlx.core as mx

from mlx_adapters.errors import UnsupportedError

__all__ = ["cached_keys", "positions"]


def cached_keys(cache: Any) -> int:
    """How many keys of each row are in the cache, padding included; never asks the device."""
    if cache is None:
        return 0
    offset = cache.offset
    # a batched cache counts each row's own tokens in an array, and the columns beside it
    return offset if isinstance(offset, int) else int(cache._idx)


def positions(inputs: mx.array, cache: Any, limit: int) -> mx.array:
    """The position of each of `inputs` [rows, time]: [time], or [rows, time] where a batch is padded.

    A padded batch has an offset per row, negative while the padding is read: such places are masked, and
    need only be valid numbers. Raises UnsupportedError past the `limit` positions of the table: MLX would
    read whatever lies behind it.
    """
    time = inputs.shape[1]
    last = cached_keys(cache) + time
    if last > limit:
        raise UnsupportedError(
            f"the text is {last} tokens long, and this model has positions for {limit}: shorten it, or ask "
            "for fewer new tokens"
        )
    offset = 0 if cache is None else cache.offset
    if isinstance(offset, mx.array):
        offset = offset[:, None]
    return mx.maximum(mx.arange(time) + offset, 0)
