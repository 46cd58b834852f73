"""The token ids that a model has, and how many tokens it takes.

MLX checks no index: an id or a position past a table is read from whatever memory lies behind it. So every
text is checked on its way to a model, by the two functions here.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.nn as nn

from mlx_adapters.errors import CheckpointError, UnsupportedError
from mlx_adapters.models import sites

__all__ = ["check_ids", "check_length", "made_for", "positions", "vocabulary"]

# What configurations call the longest text that a model was trained for.
_LENGTHS = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length"),
    *("model_max_length", "max_context_length"),
)


def made_for(config: dict[str, Any]) -> int | None:
    """The longest text in tokens that the configuration states; None where it states none.

    Past it a model with rotary positions gets worse; one with a table of them cannot go on (`positions`).
    """
    for fields in (config, config.get("text_config") or {}):
        for name in _LENGTHS:
            if isinstance(value := fields.get(name), int) and value > 0:
                return value
    return None


def vocabulary(model: nn.Module) -> int | None:
    """How many ids the token embedding has a row for; None where it has no known name."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)) and sites.is_embedding(path):
            return int(module.weight.shape[0])
    return None


def positions(model: nn.Module) -> int | None:
    """How many positions a table of learned ones has; None for a model without one."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)) and sites.is_position(path):
            holder = modules[path.rpartition(".")[0]]
            return int(getattr(holder, "limit", module.weight.shape[0]))  # OPT's first rows are no positions
    return None


def check_ids(model: nn.Module, rows: Iterable[Sequence[int]], tokenizer: Any = None) -> None:
    """Raise CheckpointError for an id of the `rows` that the model's embedding does not have.

    The rows are those of texts: virtual tokens stand past the table on purpose.
    """
    known = vocabulary(model)
    if known is None:
        return
    ends = (id for row in rows if row for id in (min(row), max(row)))
    wrong = next((id for id in ends if not 0 <= id < known), None)
    if wrong is None:
        return
    name = tokenizer.convert_ids_to_tokens(wrong) if tokenizer is not None and wrong >= 0 else None
    token = f"the token {name!r} has the id {wrong}" if name else f"there is a token with the id {wrong}"
    raise CheckpointError(
        f"{token}, and the model's embedding has rows for 0 to {known - 1}: the tokenizer has tokens that "
        "the model was never resized for. Resize it in transformers (resize_token_embeddings), or leave them "
        "out"
    )


def check_length(model: nn.Module, text: int, answer: int = 0, *, advice: str = "shorten the text") -> None:
    """Raise UnsupportedError where a text of so many tokens, virtual ones among them, and its answer are
    longer than the model's table of learned positions."""
    limit = positions(model)
    if limit is None or text + answer <= limit:
        return
    if answer and text < limit:
        advice = f"ask for at most {limit - text} new tokens, or {advice}"
    asked = f" and {answer} new ones" if answer else ""
    raise UnsupportedError(
        f"the text is {text} tokens long{asked}, and this model has positions for {limit}: {advice}"
    )
