"""How the rows of a run are written: the prompt template, the chat template and its variables."""

from dataclasses import replace

from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.data.reasoning import left_open, reasoning_of
from mlx_adapters.data.sources import Rows
from mlx_adapters.data.templates import asked, default_template
from mlx_adapters.models.load import LanguageModel
from mlx_adapters.models.own_template import ChatTemplate
from mlx_adapters.train.config import TrainConfig

__all__ = ["written_with"]


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


def _any_reasoning(rows: Rows) -> bool:
    """Whether an answer of the rows comes with reasoning."""
    return any(
        reasoning_of(message)
        for part in rows.parts or (rows,)
        for row in part.rows
        for message in row.get("messages") or ()
    )
