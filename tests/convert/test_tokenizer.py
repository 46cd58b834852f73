"""tokenizer.model: the built tokenizer.json gives sentencepiece's own tokens."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from mlx_adapters.convert.tokenizer import ensure_tokenizer
from mlx_adapters.errors import CheckpointError

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "seven",
    "dogs",
    "counted",
    "12",
    "apples",
    "and",
    "305",
    "pears",
    "in",
    "the",
    "old",
    "town",
]
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def train(folder: Path, kind: str, **options: object) -> sentencepiece.SentencePieceProcessor:
    source = random.Random(0)
    lines = [" ".join(source.choices(WORDS, k=12)) for _ in range(400)]
    settings = {
        "vocab_size": 340 if kind == "bpe" else 295,
        "byte_fallback": True,
        "minloglevel": 5,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), model_type=kind, **settings
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize(("kind", "options"), [("bpe", LLAMA), ("unigram", {}), ("bpe", {})])
def test_equal_to_sentencepiece(tmp_path: Path, kind: str, options: dict[str, object]) -> None:
    reference = train(tmp_path, kind, **options)
    ensure_tokenizer(tmp_path, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    source = random.Random(1)
    texts = [" ".join(source.choices(WORDS, k=7)) for _ in range(50)]
    texts += ["Zürich 2024 €5", "tab\tline", "日本 cat", "x", "dogs, cats: 9.5!"]
    for text in texts + (["two  spaces   here"] if options else []):
        assert tokenizer.encode(text) == [1, *reference.encode(text)], text
        assert tokenizer.decode(reference.encode(text)) == reference.decode(reference.encode(text))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


def test_settings_of_the_folder_are_kept(tmp_path: Path) -> None:
    reference = train(tmp_path, "bpe", **LLAMA)
    settings = {
        "tokenizer_class": "LLaMATokenizer",
        "add_bos_token": False,
        "model_max_length": 77,
        "bos_token": "",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ensure_tokenizer(tmp_path, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("the cat") == reference.encode("the cat")
    assert (tokenizer.model_max_length, tokenizer.bos_token) == (77, "<s>")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model at all")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        ensure_tokenizer(tmp_path, tmp_path)


def test_an_existing_tokenizer_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("mine")
    ensure_tokenizer(tmp_path, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "mine"
