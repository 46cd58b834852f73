"""How the rows of a run are written: the prompt template, the chat template and its variables."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.data.large import FileRows
from mlx_adapters.data.reasoning import left_open, reasoning_of
from mlx_adapters.data.sources import Rows
from mlx_adapters.data.templates import asked, default_template
from mlx_adapters.data.tokens import Example
from mlx_adapters.models.load import LanguageModel
from mlx_adapters.models.own_template import FILE, ChatTemplate
from mlx_adapters.train.config import TrainConfig

__all__ = ["without_start", "written_with"]

_ASKED = 10_000  # rows of a set that stays on disk: to ask all would take as long as to read it


def written_with(
    rows: Rows, model: LanguageModel, config: TrainConfig, earlier: AdapterMeta | None
) -> tuple[str, ChatTemplate, LanguageModel]:
    """(the prompt template, how chats are written, the model with the tokenizer that writes them).

    The run's settings count, then those of the adapter that training continues from (`earlier`), then what
    suits the data. The second part is stored with the adapter, so that it is asked as it was trained.
    """
    usual = default_template(rows.format, model.tokenizer)
    before = (earlier.template, earlier.chat) if earlier else ("", ChatTemplate())
    way = asked(config.template, config.chat_template_kwargs, before, fallback=usual)
    chat = replace(way.chat, unasked="", stops={})
    if way.template == "chat":
        if not chat.kwargs:
            chat = replace(chat, kwargs=model.chat.kwargs)
        tokenizer = chat.on(model.tokenizer)
        unasked = left_open(tokenizer)
        unasked = "" if unasked and _any_reasoning(rows) else unasked
    else:
        tokenizer, unasked = model.tokenizer, ""
    ends = {str(tokenizer.convert_ids_to_tokens(end)): int(end) for end in sorted(tokenizer.eos_token_ids)}
    stored = replace(chat, unasked=unasked, stops=ends)
    return way.template, stored, replace(model, tokenizer=tokenizer)


def without_start(chat: ChatTemplate, tokenizer: Any, examples: Sequence[Example]) -> list[str]:
    """A sentence where a chat template of the user's own leaves out the token that this tokenizer begins
    texts with; none otherwise. transformers adds none to what a template writes, so nothing here does."""
    start = tokenizer.bos_token_id
    begins = start is not None and start in tokenizer.encode("", add_special_tokens=True)
    if not (chat.text and begins and examples) or start in examples[0].ids:
        return []
    return [
        f"{chat.origin or FILE}: writes no {tokenizer.bos_token}, which texts for this base begin with: "
        "put {{ bos_token }} in front"
    ]


def _any_reasoning(rows: Rows) -> bool:
    """Whether an answer of the rows comes with reasoning; of a set that stays on disk the first are asked."""
    return any(
        reasoning_of(message)
        for part in rows.parts or (rows,)
        for row in islice(part.rows, _ASKED if isinstance(part.rows, FileRows) else None)
        for message in row.get("messages") or ()
    )
