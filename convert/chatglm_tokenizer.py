"""Build tokenizer.json for ChatGLM-6B from its ice_text.model, a sentencepiece model.

The checkpoint's own code, which never runs here, writes line breaks, tabs and runs of spaces as pieces of
their own before sentencepiece sees a text, counts ids from behind the image tokens, and puts [gMASK] <sop>
behind a text. All of that a tokenizer.json can say. What it cannot: of a text that is nothing but one such
piece ("\\n") the leading space is missing.
"""

import json
from pathlib import Path
from typing import Any

from mlx_adapters.convert.tokenizer import (
    CONTROL,
    SPACE,
    UNKNOWN,
    USER,
    add_tokens,
    from_proto,
    read_proto,
    settings_of,
)
from mlx_adapters.errors import CheckpointError, UnsupportedError

__all__ = ["FILE", "chatglm_tokenizer"]

FILE = "ice_text.model"
_BREAK, _TAB = "<n>", "<|tab|>"
_LONGEST = 80  # spaces that one piece stands for
_IMAGES = 20000  # ids of images in front of those of texts, where tokenizer_config.json says nothing
_START, _END, _MASK = "<sop>", "<eop>", "[gMASK]"
_UNUSED = 5  # sentencepiece's SentencePiece.Type


def chatglm_tokenizer(src: Path, dst: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json to `dst`, from the ice_text.model in `src`.

    Raises CheckpointError for a file that is no sentencepiece model, UnsupportedError for settings that are
    not read and for the model of the first release, which gets its special tokens from code.
    """
    from tokenizers import AddedToken, processors

    file, settings = src / FILE, settings_of(src)
    for name in ("do_lower_case", "remove_space"):
        if settings.get(name):
            raise UnsupportedError(f"{src}: tokenizer_config.json: field {name!r} is set, which is not read")
    images = settings.get("num_image_tokens", _IMAGES)
    if not isinstance(images, int) or not 0 <= images <= _IMAGES:
        raise CheckpointError(f"{src}: tokenizer_config.json: num_image_tokens is {images!r}, no such number")
    proto = read_proto(file)
    known = {piece.piece for piece in proto.pieces}
    if missing := [token for token in (_START, _END, _MASK, _BREAK) if token not in known]:
        raise UnsupportedError(
            f"{file}: has no piece {missing[0]}: it is of the first release, whose special tokens stand in "
            "its code. Take ice_text.model, config.json and the weights of a later revision"
        )
    types = {piece.piece: piece.type for piece in proto.pieces}
    users = [name for name, kind in types.items() if kind == USER]
    tokenizer: Any = from_proto(file, _behind_images(proto, images))
    tokenizer.normalizer, tokenizer.decoder = _spaces(proto, users)
    add_tokens(tokenizer, [name for name, kind in types.items() if kind in (UNKNOWN, CONTROL)], [])
    # found in the text as it is after line breaks and spaces were replaced
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=True) for token in users])
    specials = [AddedToken(token, special=True, normalized=False) for token in (_MASK, _START, _END)]
    tokenizer.add_special_tokens(specials)
    ids = [(token, tokenizer.token_to_id(token)) for token in (_MASK, _START)]
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", _MASK, _START], special_tokens=ids)
    tokenizer.save(str(dst / "tokenizer.json"))
    written = {name: value for name, value in settings.items() if name not in ("auto_map", "vocab_file")}
    written |= {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": _START, "eos_token": _END}
    for name, token in (("pad_token", "<pad>"), ("unk_token", "<unk>")):
        if token in types:
            written.setdefault(name, token)
    text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
    (dst / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _behind_images(proto: Any, images: int) -> Any:
    """The model with so many pieces in front, which no text has."""
    whole = type(proto)()
    whole.CopyFrom(proto)
    del whole.pieces[:]
    lowest = min(piece.score for piece in proto.pieces)  # what unknown characters cost follows from that
    for number in range(images):
        whole.pieces.add(piece=f"\0<image_{number}>", score=lowest, type=_UNUSED)
    whole.pieces.extend(proto.pieces)
    return whole


def _spaces(proto: Any, users: list[str]) -> tuple[Any, Any]:
    """(normalizer, decoder): what the checkpoint's code does to a text, then sentencepiece, and back."""
    from tokenizers import Regex, decoders, normalizers

    spec = proto.normalizer_spec
    blanks = [(" " * n, f"<|blank_{n}|>") for n in range(_LONGEST, 1, -1) if f"<|blank_{n}|>" in users]
    written = [("\n", _BREAK), ("\t", _TAB), *blanks]
    steps: list[Any] = [normalizers.Replace(plain, token) for plain, token in written if token in users]
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        # not before a piece that stands alone: its own name goes through here to be looked for
        alone = r"<n>|<\|tab\|>|<\|blank_\d+\|>"
        steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{alone})\z)(?=.)"), SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    back: list[Any] = [decoders.Replace(token, plain) for plain, token in written if token in users]
    back += [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    return normalizers.Sequence(steps), decoders.Sequence(back)
