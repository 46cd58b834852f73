"""Build tokenizer.json: from byte-pair merges, or from sentencepiece's tokenizer.model (the first LLaMA)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_adapters.errors import CheckpointError, UnsupportedError
from mlx_adapters.files.documents import read_object

__all__ = [
    "CONTROL",
    "SPACE",
    "UNKNOWN",
    "USER",
    "add_ends",
    "add_tokens",
    "byte_level_bpe",
    "ensure_tokenizer",
    "from_proto",
    "read_proto",
    "sentencepiece_bpe",
    "settings_of",
    "spaced_bpe",
]

SPACE = "▁"
_UNIGRAM, _BPE = 1, 2  # sentencepiece's TrainerSpec.ModelType
UNKNOWN, CONTROL, USER, _BYTE = 2, 3, 4, 6  # sentencepiece's SentencePiece.Type (normal is 1)


def ensure_tokenizer(src: Path, dst: Path) -> None:
    """Make sure `dst` has a tokenizer.json: nothing if `src` has one, else built from its tokenizer.model.

    Raises CheckpointError for a tokenizer.model that cannot be read, UnsupportedError for a model type or a
    text normalisation that tokenizer.json cannot express.
    """
    file = Path(src) / "tokenizer.model"
    if (Path(src) / "tokenizer.json").exists() or (Path(dst) / "tokenizer.json").exists():
        return
    proto = read_proto(file)
    settings = settings_of(Path(src))
    special = {
        f"{name}_token": piece
        for name, piece in _ids(proto).items()
        if piece is not None and settings.get(f"{name}_token") is None
    }
    tokenizer = from_proto(file, proto)
    pieces = proto.pieces
    controls = [piece.piece for piece in pieces if piece.type in (UNKNOWN, CONTROL)]
    add_tokens(tokenizer, controls, [piece.piece for piece in pieces if piece.type == USER])
    begins, ends = settings.get("add_bos_token", True), settings.get("add_eos_token", False)
    ids = _ids(proto)
    add_ends(tokenizer, bos=ids["bos"] if begins else None, eos=ids["eos"] if ends else None)
    tokenizer.save(str(Path(dst) / "tokenizer.json"))
    written = settings | special | {"tokenizer_class": "PreTrainedTokenizerFast"}
    written |= {"add_bos_token": bool(begins), "add_eos_token": bool(ends)}
    text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
    (Path(dst) / "tokenizer_config.json").write_text(text, encoding="utf-8")


def byte_level_bpe(
    tokens: Sequence[str],
    merges: Sequence[tuple[str, str]],
    patterns: Sequence[str],
    *,
    nfc: bool = False,
    whole_words: bool = False,
) -> Any:
    """A GPT-2 style tokenizer that cuts a text by each of `patterns` in turn before merging bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer: Any = Tokenizer(models.BPE(vocabulary, list(merges), ignore_merges=whole_words))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe(
    pieces: Sequence[tuple[str, float]],
    *,
    mergeable: Sequence[bool],
    unknown: str | None,
    prefix: bool = True,
    byte_fallback: bool = True,
) -> Any:
    """Sentencepiece's BPE, whose merges are implied: of all pairs that make a piece, the best score first."""
    from tokenizers import Tokenizer, models

    vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
    usable = {piece for (piece, _), normal in zip(pieces, mergeable, strict=True) if normal}
    ranked: list[tuple[float, int, str, str]] = []
    for index, (piece, score) in enumerate(pieces):
        if piece in usable:
            halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
            ranked += [(-score, index, a, b) for a, b in halves if a in usable and b in usable]
    ranked.sort(key=lambda merge: merge[:2])
    tokenizer: Any = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for _, _, left, right in ranked],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    _spaces(tokenizer, prefix=prefix)
    return tokenizer


def spaced_bpe(tokens: Sequence[str], merges: Sequence[tuple[str, str]], *, unknown: str) -> Any:
    """Gemma 4's BPE: merges across whole words, spaces as in sentencepiece, and bytes for what is not in the
    vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer: Any = Tokenizer(
        models.BPE(vocabulary, list(merges), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def add_tokens(tokenizer: Any, controls: Sequence[str], users: Sequence[str]) -> None:
    """Mark tokens that are matched whole in a text: decoding leaves out `controls` only."""
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in users])


def add_ends(tokenizer: Any, *, bos: str | None, eos: str | None) -> None:
    """Put `bos` before and `eos` after every encoded text."""
    from tokenizers import processors

    if bos is None and eos is None:
        return
    parts = [bos] if bos else []
    after = [eos] if eos else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*parts, "$A", *after],
        pair=[*parts, "$A", *after, *(f"{token}:1" for token in parts), "$B:1", *(f"{t}:1" for t in after)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(parts + after)],
    )


def _spaces(tokenizer: Any, *, prefix: bool, before: Sequence[Any] = ()) -> None:
    from tokenizers import decoders, normalizers

    steps = [*before, *([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, *([decoders.Strip(" ", 1, 0)] if prefix else [])])


# tokenizer.model -------------------------------------------------------------------------------------------


def read_proto(file: Path) -> Any:
    """The sentencepiece model in a file; CheckpointError where it is none."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except Exception:  # protobuf's DecodeError
        raise CheckpointError(f"{file}: is not a sentencepiece model; download it again") from None
    if not proto.pieces:
        raise CheckpointError(f"{file}: is not a sentencepiece model (it has no pieces); download it again")
    return proto


def from_proto(file: Path, proto: Any) -> Any:
    """A tokenizer that cuts texts as sentencepiece does, without special tokens; UnsupportedError for what
    tokenizer.json cannot express."""
    from tokenizers import Regex, Tokenizer, models, normalizers

    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    unknown = next((index for index, piece in enumerate(proto.pieces) if piece.type == UNKNOWN), None)
    if trainer.model_type == _BPE:
        tokenizer = sentencepiece_bpe(
            pieces,
            mergeable=[piece.type not in (UNKNOWN, CONTROL, _BYTE) for piece in proto.pieces],
            unknown=None if unknown is None else pieces[unknown][0],
            byte_fallback=trainer.byte_fallback,
        )
    elif trainer.model_type == _UNIGRAM:
        tokenizer = Tokenizer(models.Unigram(pieces, unknown, trainer.byte_fallback))
    else:
        raise UnsupportedError(f"{file}: is neither a BPE nor a unigram model; no tokenizer.json can say it")
    if trainer.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise UnsupportedError(f"{file}: treats spaces in a way that tokenizer.json cannot express")
    before: list[Any] = []
    if spec.precompiled_charsmap:
        before.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        before += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    _spaces(tokenizer, prefix=spec.add_dummy_prefix, before=before)
    return tokenizer


def _ids(proto: Any) -> dict[str, str | None]:
    trainer = proto.trainer_spec
    places = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id, "pad": trainer.pad_id}
    return {
        name: proto.pieces[place].piece if 0 <= place < len(proto.pieces) else None
        for name, place in places.items()
    }


def settings_of(src: Path) -> dict[str, Any]:
    """What the files beside a tokenizer say that has a value."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = src / name
        if not file.exists():
            continue
        found = read_object(file, CheckpointError)
        settings |= {key: value for key, value in found.items() if value not in (None, "")}
    return settings
