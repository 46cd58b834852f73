"""The tokens that end an answer: one function of a model's folder, for reading it and for writing it.

A folder names them in several places, none of which has all: `generation_config.json` (Phi-3's `<|end|>` is
only there), `config.json`, the tokenizer's end token, and the chat template, which closes every answer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_adapters.errors import AdaptersError, CheckpointError
from mlx_adapters.files.documents import read_object
from mlx_adapters.models.chat_template import chat_prompt

__all__ = ["stop_tokens", "store", "turn_end"]

_GENERATION = "generation_config.json"
_PROBE = "zqxj"  # an answer that occurs in no template


def stop_tokens(folder: Path, config: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """The ids that end an answer of the model in `folder`, whose `config.json` is `config`.

    As in transformers, `generation_config.json` counts before `config.json`: there a token of the latter only
    counts if the tokenizer marks it as special, because a configuration class's default is often left in it.
    """
    file = folder / _GENERATION
    stated = _ids(read_object(file, CheckpointError).get("eos_token_id"), file) if file.is_file() else []
    text = config.get("text_config")
    named = config.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
    marked = {index for index, token in _added(tokenizer).items() if token.special}
    own = [index for index in _ids(named, folder / "config.json") if not stated or index in marked]
    found = [*stated, *own, tokenizer.eos_token_id, turn_end(tokenizer)]
    return list(dict.fromkeys(index for index in found if index is not None))


def turn_end(tokenizer: Any) -> int | None:
    """The token that the chat template writes after an answer: the one that closes it or, where nothing does,
    the one that opens the next turn. None without a template, or where that is no token of its own."""
    added = _added(tokenizer)
    if not tokenizer.has_chat_template or not added:
        return None
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}
    for turns in ([question, answer], [question, answer, question]):
        try:
            text = chat_prompt(turns, tokenizer, answer=False)
        except AdaptersError:  # a template need not render such a conversation
            continue
        after = text.rpartition(_PROBE)[2].strip() if _PROBE in text else ""
        first = tokenizer.encode(after, add_special_tokens=False)[:1] if after else []
        token = added.get(first[0]) if first else None
        if token is not None and after.startswith(token.content):
            return int(first[0])
    return None


def store(folder: Path, ends: list[int]) -> None:
    """Write `ends` where transformers and mlx-lm look for them: `config.json`, and `generation_config.json`
    where there is one, since it would count before."""
    value = ends if len(ends) > 1 else ends[0] if ends else None
    for file in (folder / "config.json", folder / _GENERATION):
        fields = read_object(file, CheckpointError) if file.is_file() else {}
        if fields and fields.get("eos_token_id") != value:
            text = json.dumps(fields | {"eos_token_id": value}, indent=2)
            file.write_text(text + "\n", encoding="utf-8")


def _added(tokenizer: Any) -> dict[int, Any]:
    """The tokens that are matched whole in a text, by id."""
    try:
        return dict(tokenizer.added_tokens_decoder)
    except NotImplementedError:  # transformers' backend for mistral-common
        return {}


def _ids(value: Any, file: Path) -> list[int]:
    """An id or a list of them; a negative one stands for none."""
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in found):
        raise CheckpointError(
            f"{file}: field 'eos_token_id' is {value!r:.60}, not a token id or a list of them"
        )
    return [index for index in found if index >= 0]
