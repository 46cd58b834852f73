"""Rows to token ids, and where the supervised part begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_adapters.data.sources import Rows, check_fields
from mlx_adapters.data.templates import render
from mlx_adapters.errors import ConfigError, DataError, unknown
from mlx_adapters.models.chat_template import Rendered

__all__ = ["LOSS_ON", "Encoded", "Example", "encode", "end_id", "prompt_ids"]

LOSS_ON = ("completion", "all")


@dataclass(frozen=True)
class Example:
    """Token `ids`, with labels from index `loss_start` on (at least 1: nothing predicts the first)."""

    ids: list[int]
    loss_start: int


@dataclass(frozen=True)
class Encoded:
    """Examples, and what is odd about the rows: `truncated` lost their end (at least the end token) at the
    cutoff, `dropped` had nothing left to learn, `empty` have no answer, `repeated` are the same as an earlier
    one. `endless` where the tokenizer has no end token to learn."""

    examples: list[Example]
    truncated: int
    dropped: int
    empty: int = 0
    repeated: int = 0
    endless: bool = False


def end_id(tokenizer: Any) -> int | None:
    """The token that ends an answer: the tokenizer's, else the lowest that the configuration names."""
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    ends = [id for id in getattr(tokenizer, "eos_token_ids", ()) if id is not None]
    return int(min(ends)) if ends else None


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Token ids of a prompt. What a chat template wrote is encoded as it is, as transformers does; any other
    text gets the tokenizer's start token, unless it begins with it, and no end token."""
    if isinstance(prompt, Rendered):
        return list(tokenizer.encode(prompt, add_special_tokens=False))
    start = tokenizer.bos_token
    ids: list[int] = list(
        tokenizer.encode(prompt, add_special_tokens=not (start and prompt.startswith(start)))
    )
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids.pop()
    return ids


def encode(
    rows: Rows, tokenizer: Any, *, template: str, cutoff: int = 256, loss_on: str = "completion"
) -> Encoded:
    """Encode training rows; an end token is appended unless the row was cut at `cutoff` tokens.

    Prompt and completion are encoded apart: the boundary is then exact whatever the tokenizer merges, and
    the prompt's tokens are those that generation starts from. `loss_on` is `completion` or `all` (prompt
    included, as in the paper). Raises DataError when nothing remains.
    """
    if loss_on not in LOSS_ON:
        raise ConfigError(unknown("value of loss-on", loss_on, LOSS_ON))
    examples: list[Example] = []
    truncated = dropped = empty = 0
    seen: set[tuple[str, str]] = set()
    for index, row in enumerate(rows.rows):
        try:
            check_fields(row, rows.format)
            prompt, completion = render(row, rows.format, template=template, tokenizer=tokenizer)
        except DataError as error:
            raise DataError(f"{rows.origin}: row {index}: {error}") from None
        example, cut = _example(prompt, completion, tokenizer, cutoff, loss_on)
        seen.add((prompt, completion))
        empty += not completion.strip()
        truncated += cut
        if example is None:
            dropped += 1
        else:
            examples.append(example)
    if not examples:
        raise DataError(f"{rows.origin}: no row has a token to learn within {cutoff} tokens. Raise --cutoff")
    return Encoded(
        examples,
        truncated,
        dropped,
        empty=empty,
        repeated=len(rows.rows) - len(seen),
        endless=end_id(tokenizer) is None,
    )


def _example(
    prompt: str, completion: str, tokenizer: Any, cutoff: int, loss_on: str
) -> tuple[Example | None, bool]:
    before: Sequence[int] = prompt_ids(prompt, tokenizer) if prompt else _start(completion, tokenizer)
    ids, end = [*before, *tokenizer.encode(completion, add_special_tokens=False)], end_id(tokenizer)
    if end is not None and (len(ids) == len(before) or ids[-1] != end):  # the text may bring its own
        ids.append(end)
    cut = len(ids) > cutoff
    ids = ids[:cutoff]
    start = max(1, len(before) if loss_on == "completion" else 1)
    return (Example(ids, start) if start < len(ids) else None), cut


def _start(text: str, tokenizer: Any) -> list[int]:
    """What the tokenizer writes before an answer by itself, up to its start token, where `text` does not."""
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        return []
    ids = list(tokenizer.encode("", add_special_tokens=True))
    start = tokenizer.bos_token_id
    return ids[: ids.index(start) + 1] if start in ids else []
