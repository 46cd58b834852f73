"""The tokenizer in a GGUF file's metadata, as tokenizer.json and tokenizer_config.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_adapters.convert import tokenizer as building
from mlx_adapters.convert.gguf_pretokenizers import PRE_TOKENIZERS, Cut
from mlx_adapters.errors import CheckpointError, UnsupportedError, unknown

__all__ = ["ENDS", "write"]

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_MODELS = ("gpt2", "llama", "gemma4")
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
        if str(fields.get("general.architecture")).startswith("gemma"):
            # its merges go by the places of the pieces, as transformers has it, and the scores may not
            scores = [-float(place) for place in range(len(tokens))]
        tokenizer = building.sentencepiece_bpe(
            list(zip(tokens, scores, strict=True)),
            mergeable=[kind in (_NORMAL, _UNUSED) for kind in kinds],
            unknown=special.get("unk_token"),
            prefix=bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
        )
    elif model == "gemma4":
        unknown_token = special.get("unk_token", "<unk>")
        tokenizer = _fitting(
            source, building.spaced_bpe, tokens, _merges(fields, source), unknown=unknown_token
        )
    else:
        raise UnsupportedError(f"{source}: {unknown('tokenizer model', str(model), _MODELS)}")
    controls = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _UNKNOWN)]
    users = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER]
    begins = bool(fields.get("tokenizer.ggml.add_bos_token", model != "gpt2" or _cut(fields, source).begins))
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


def _cut(fields: dict[str, Any], source: Path) -> Cut:
    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedError(f"{source}: {unknown('tokenizer.ggml.pre', str(pre), PRE_TOKENIZERS)}")
    return PRE_TOKENIZERS[pre]


def _byte_level(fields: dict[str, Any], tokens: list[str], source: Path) -> Any:
    cut = _cut(fields, source)
    return _fitting(
        source,
        building.byte_level_bpe,
        tokens,
        _merges(fields, source),
        cut.patterns,
        nfc=cut.nfc,
        whole_words=cut.whole_words,
    )


def _merges(fields: dict[str, Any], source: Path) -> list[tuple[str, str]]:
    merges = []
    for line in _list(fields, "merges", str, source):
        left, space, right = line.partition(" ")
        if not (left and space and right):
            raise CheckpointError(
                f"{source}: metadata 'tokenizer.ggml.merges' has {line!r:.60}, which is not a pair"
            )
        merges.append((left, right))
    return merges


def _fitting(source: Path, build: Callable[..., Any], *parts: Any, **options: Any) -> Any:
    try:
        return build(*parts, **options)
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
