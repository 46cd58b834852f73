"""ChatGLM-6B's tokenizer.json against sentencepiece, and the checkpoint's own steps around it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mlx_adapters.convert.chatglm_tokenizer import chatglm_tokenizer
from mlx_adapters.data.sources import Rows
from mlx_adapters.data.tokens import encode, prompt_ids
from mlx_adapters.errors import CheckpointError, UnsupportedError

sentencepiece = pytest.importorskip("sentencepiece")
LINES = [
    "tom has 3 apples and buys 4 more.",
    "how many apples has tom?",
    "the answer is 7, says tom",
    "你好，世界",
]
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
BLANKS = ["<n>", "<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))]
TEXTS = [
    *LINES,
    "tom",
    " tom",
    "tom  has   3",
    "tom\nhas\n\n3 apples",
    "\n tom",
    "tom\t\thas",
    " " * 100 + "tom",
    "a b\n" + " " * 7 + "c",
    "été ☃ \U0001f600",
    "<image_3> tom",
    "",
]


def trained(folder: Path, kind: str) -> Any:
    """A small ice_text.model, with the pieces of ChatGLM's in its order: special ones last."""
    from sentencepiece import sentencepiece_model_pb2

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 4),
        model_writer=model,
        vocab_size=330 if kind == "bpe" else 325,
        model_type=kind,
        byte_fallback=True,
        pad_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    for piece in BLANKS:
        proto.pieces.add(piece=piece, score=0.0, type=4)
    for piece in SPECIAL:
        proto.pieces.add(piece=piece, score=0.0, type=3)
    (folder / "ice_text.model").write_bytes(proto.SerializeToString())
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def written(text: str) -> str:
    """What the checkpoint's code gives sentencepiece."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for length in range(80, 1, -1):
        text = text.replace(" " * length, f"<|blank_{length}|>")
    return text


@pytest.fixture(scope="module", params=[("bpe", 0), ("unigram", 0), ("unigram", 20)], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, int]:
    kind, images = request.param
    folder = tmp_path_factory.mktemp("ice")
    theirs = trained(folder, kind)
    settings = {
        "tokenizer_class": "ChatGLMTokenizer",
        "num_image_tokens": images,
        "bos_token": "<sop>",
        "eos_token": "<eop>",
        "remove_space": False,
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "out").mkdir()
    chatglm_tokenizer(folder, folder / "out")
    return AutoTokenizer.from_pretrained(folder / "out"), theirs, images


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_ids_and_text(text: str, pair: tuple[Any, Any, int]) -> None:
    ours, theirs, images = pair
    expected = [images + number for number in theirs.EncodeAsIds(written(text))]
    assert ours.encode(text, add_special_tokens=False) == expected
    decoded = theirs.DecodeIds([number - images for number in expected])
    for length in range(2, 81):
        decoded = decoded.replace(f"<|blank_{length}|>", " " * length)
    decoded = decoded.replace("<n>", "\n").replace("<|tab|>", "\t")
    assert ours.decode(expected, clean_up_tokenization_spaces=False) == decoded


def test_a_row_is_context_mask_start_answer_end(pair: tuple[Any, Any, int]) -> None:
    ours, theirs, images = pair
    ends = [images + theirs.PieceToId(token) for token in ("[gMASK]", "<sop>", "<eop>")]
    prompt = [images + number for number in theirs.EncodeAsIds("how many")]
    assert prompt_ids("how many", ours) == [*prompt, *ends[:2]]
    rows = Rows([{"instruction": "how many", "output": "tom"}], "instruction", "a test")
    (example,) = encode(rows, ours, template="plain").examples
    answer = [images + number for number in theirs.EncodeAsIds("tom")]
    assert example.ids == [*prompt, *ends[:2], *answer, ends[2]]
    assert example.ids[: example.loss_start] == [*prompt, *ends[:2]]


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    trained(tmp_path, "unigram")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    with pytest.raises(UnsupportedError, match="do_lower_case"):
        chatglm_tokenizer(tmp_path, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"num_image_tokens": "many"}))
    with pytest.raises(CheckpointError, match="num_image_tokens"):
        chatglm_tokenizer(tmp_path, tmp_path)
    bare = sentencepiece_without(tmp_path / "ice_text.model", SPECIAL)
    (tmp_path / "ice_text.model").write_bytes(bare)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UnsupportedError, match="of the first release"):
        chatglm_tokenizer(tmp_path, tmp_path)
    (tmp_path / "ice_text.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="not a sentencepiece model"):
        chatglm_tokenizer(tmp_path, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def sentencepiece_without(file: Path, names: list[str]) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(file.read_bytes())
    kept = [piece for piece in proto.pieces if piece.piece not in names]
    del proto.pieces[:]
    proto.pieces.extend(kept)
    whole: bytes = proto.SerializeToString()
    return whole
