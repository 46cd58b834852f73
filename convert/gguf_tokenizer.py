"""The tokenizer in a GGUF file's metadata, as tokenizer.json and tokenizer_config.json."""

import json
from pathlib import Path
from typing import Any

from mlx_adapters.convert import tokenizer as building
from mlx_adapters.errors import CheckpointError, UnsupportedError, unknown

__all__ = ["ENDS", "PRE_TOKENIZERS", "write"]

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# tokenizer.ggml.pre -> the regular expressions that cut a text before byte-pair merging, in order
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": (_WORDS,),
    "gpt-2": (_WORDS,),
    "smollm": (r"\p{N}", _WORDS),
    "starcoder": (r"\p{N}", _WORDS),
    "llama-bpe": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
}
_WHOLE_WORDS_FIRST = ("llama-bpe", "smaug-bpe")  # a word in the vocabulary is taken without merging
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
ENDS = ("eos", "eot", "eom")  # of a text, a turn, a message: llama.cpp ends an answer at each of them


def write(fields: dict[str, Any], dst: Path, *, source: Path) -> None:
    """Write the tokenizer that the metadata `fields` of the file `source` describe to the folder `dst`."""
    tokens = _list(fields, "tokens", str, source)
    kinds = _list(fields, "token_type", int, source, length=len(tokens))
    model = fields.get("tokenizer.ggml.model")
    special = _special(fields, tokens, source)
    if model == "gpt2":
        tokenizer = _byte_level(fields, tokens, source)
    elif model == "llama":
        scores = _list(fields, "scores", float, source, length=len(tokens))
        tokenizer = building.sentencepiece_bpe(
            list(zip(tokens, scores, strict=True)),
            mergeable=[kind in (_NORMAL, _UNUSED) for kind in kinds],
            unknown=special.get("unk_token"),
            prefix=bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
        )
    else:
        raise UnsupportedError(f"{source}: {unknown('tokenizer model', str(model), ('gpt2', 'llama'))}")
    controls = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _UNKNOWN)]
    users = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER]
    begins = bool(fields.get("tokenizer.ggml.add_bos_token", model == "llama" or _is_llama3(fields)))
    ends = bool(fields.get("tokenizer.ggml.add_eos_token", False))
    building.add_tokens(tokenizer, controls, users)
    building.add_ends(
        tokenizer,
        bos=special.get("bos_token") if begins else None,
        eos=special.get("eos_token") if ends else None,
    )
    tokenizer.save(str(dst / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    settings |= {"add_bos_token": begins, "add_eos_token": ends, "clean_up_tokenization_spaces": False}
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    (dst / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _is_llama3(fields: dict[str, Any]) -> bool:
    return fields.get("tokenizer.ggml.pre") in _WHOLE_WORDS_FIRST


def _byte_level(fields: dict[str, Any], tokens: list[str], source: Path) -> Any:
    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedError(f"{source}: {unknown('tokenizer.ggml.pre', str(pre), PRE_TOKENIZERS)}")
    merges = []
    for line in _list(fields, "merges", str, source):
        left, space, right = line.partition(" ")
        if not (left and space and right):
            raise CheckpointError(
                f"{source}: metadata 'tokenizer.ggml.merges' has {line!r:.60}, which is not a pair"
            )
        merges.append((left, right))
    try:
        return building.byte_level_bpe(
            tokens, merges, PRE_TOKENIZERS[pre], nfc=pre == "qwen2", whole_words=pre in _WHOLE_WORDS_FIRST
        )
    except Exception as error:  # tokenizers raises plain Exception for a merge outside the vocabulary
        raise CheckpointError(
            f"{source}: metadata 'tokenizer.ggml.merges' does not fit the tokens ({error})"
        ) from None


def _list(
    fields: dict[str, Any], name: str, kind: type, source: Path, *, length: int | None = None
) -> list[Any]:
    values = fields.get(f"tokenizer.ggml.{name}")
    sound = isinstance(values, list) and values and all(type(value) is kind for value in values)
    if not isinstance(values, list) or not sound or length not in (None, len(values)):
        expected = "a list" if length is None else f"a list of {length}, one a token"
        raise CheckpointError(f"{source}: metadata 'tokenizer.ggml.{name}' is missing or not {expected}")
    return values


def _special(fields: dict[str, Any], tokens: list[str], source: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in (*_SPECIAL, *ENDS[1:]):
        index = fields.get(f"tokenizer.ggml.{name}_token_id")
        if index is None:
            continue
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise CheckpointError(
                f"{source}: metadata 'tokenizer.ggml.{name}_token_id' is {index!r:.40}, "
                f"not one of {len(tokens)} tokens"
            )
        if name in _SPECIAL:
            found[f"{_SPECIAL[name]}_token"] = tokens[index]
    return found
