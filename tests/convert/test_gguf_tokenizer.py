"""Tokenizers of GGUF files against transformers': how texts are cut, and Gemma 4's own kind."""

import io
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import as_written, llama_weights, write_tiny

from mlx_adapters.convert import gguf_tokenizer
from mlx_adapters.convert.gguf import read_gguf
from mlx_adapters.convert.gguf_pretokenizers import PRE_TOKENIZERS

TEXT = "I'm   in  Élan, THEY'LL 12345 + x_y/z\r\n\n  naïve\tfoo… देवनागरी 漢字かな 🙂  "
WORDS = ["a", "b", "c", "▁", "ab", "▁a", "▁ab", "abc", "▁abc", "▁▁", "b▁a"]
MERGES = [("a", "b"), ("▁", "a"), ("▁a", "b"), ("▁", "ab"), ("ab", "c"), ("▁", "▁"), ("b", "▁a")]


def test_texts_are_cut_as_transformers_cuts_them() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as THEIRS

    both = PRE_TOKENIZERS.keys() & THEIRS.keys()
    assert both >= {"llama-bpe", "tekken", "qwen2", "qwen35", "gpt-4o", "lfm2", "dbrx"}
    assert {name: PRE_TOKENIZERS[name].patterns for name in both} == {name: (THEIRS[name],) for name in both}


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_rule_is_a_pattern_that_loses_nothing(pre: str) -> None:
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre].patterns]
    pieces = [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(TEXT)]
    assert "".join(pieces) == TEXT
    assert len(pieces) > 15


def test_qwen_rules_are_those_of_its_tokenizers() -> None:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2
    from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN35

    assert (PRE_TOKENIZERS["qwen2"].patterns, PRE_TOKENIZERS["qwen35"].patterns) == ((QWEN2,), (QWEN35,))


def gemma4_fields(**others: Any) -> dict[str, Any]:
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", *WORDS, *bytes_]
    kinds = [3, 3, 3, 2, 3] + [1] * len(WORDS) + [6] * 256
    fields = {
        "model": "gemma4",
        "tokens": tokens,
        "token_type": kinds,
        "merges": [f"{left} {right}" for left, right in MERGES],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unknown_token_id": 3,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (fields | others).items()}


def test_gemma4_encodes_as_its_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GemmaTokenizer

    fields = gemma4_fields()
    gguf_tokenizer.write(fields, tmp_path, source=Path("x.gguf"))
    ours = AutoTokenizer.from_pretrained(tmp_path)
    vocabulary = {token: place for place, token in enumerate(fields["tokenizer.ggml.tokens"])}
    theirs = GemmaTokenizer(vocab=vocabulary, merges=MERGES)
    for text in ("abc ab a", "  abc\n\nb", "é 漢 ab", "b a<|turn>abc", " a  b   c", ""):
        found = ours.encode(text, add_special_tokens=False)
        if "<|turn>" not in text:
            assert found == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(found) == text
    assert ours.encode("ab")[0] == 2  # the file says nothing: a text begins with <bos>
    assert ours.encode("b a<|turn>abc", add_special_tokens=False).count(4) == 1


@pytest.mark.parametrize(
    ("pre", "begins"), [("tekken", True), ("lfm2", True), ("qwen35", False), ("gpt-4o", False)]
)
def test_a_file_that_does_not_say_begins_as_llama_cpp_does(tmp_path: Path, pre: str, begins: bool) -> None:
    from transformers import AutoTokenizer

    file = write_tiny(tmp_path / "a.gguf", as_written(llama_weights()), pre=pre)
    read_gguf(file, keep_quantized=True).write_tokenizer(tmp_path)
    encoded = AutoTokenizer.from_pretrained(tmp_path).encode("abc a")
    assert (encoded[0] == 1) == begins
    assert encoded[-2:] == [32, 31]


def sentencepiece_fields(scores: str, **others: Any) -> tuple[Any, dict[str, Any]]:
    """A sentencepiece model trained on our pages, and its metadata as llama.cpp's converter writes them."""
    import sentencepiece

    pages = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    lines = [line for page in pages[:4] for line in page.read_text(encoding="utf-8").splitlines() if line]
    users, out = ["\n", "\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<turn>"], io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=others.get("add_space_prefix", True),
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=users,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    pieces = [model.id_to_piece(place) for place in range(model.vocab_size())]
    kinds = [3, 3, 3, 2] + [4 if p in users else 6 if p.startswith("<0x") else 1 for p in pieces[4:]]
    fields = {
        "model": "llama",
        "tokens": [p.replace("▁", " ") if p in users else p for p in pieces],
        "token_type": kinds,
        "scores": [model.get_score(p) if scores == "own" else -1000.0 for p in range(len(pieces))],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unknown_token_id": 3,
    }
    return model, {f"tokenizer.ggml.{name}": value for name, value in (fields | others).items()}


@pytest.mark.parametrize(
    ("arch", "scores", "prefix"),
    [("llama", "own", True), ("gemma3", "own", False), ("gemma3", "none", False)],
)
def test_sentencepiece_encodes_as_itself(tmp_path: Path, arch: str, scores: str, prefix: bool) -> None:
    from transformers import AutoTokenizer

    model, fields = sentencepiece_fields(scores, add_space_prefix=prefix)
    gguf_tokenizer.write(fields | {"general.architecture": arch}, tmp_path, source=Path("x.gguf"))
    ours = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["The adapter trains.", "c 12345 x", "漢字 é ñ 🙂", "it ends with a space "]
    if not prefix:  # Hugging Face puts the prefix after each token that is matched whole as well
        texts += ["  two  spaces   three    four     five", "a\n\nb\n\n\nc", "<turn>user\n    code<turn>"]
    for text in texts:
        found = ours.encode(text, add_special_tokens=False)
        assert found == model.encode(text), text
        assert ours.decode(found) == text
    assert len(ours.encode(texts[0], add_special_tokens=False)) < len(texts[0]) / 2
