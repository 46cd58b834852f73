"""GGUF: exact values against the gguf package, row order and logits against transformers, damaged files."""

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_gguf import HEADS, HIDDEN, KV, VOCAB, as_written, gguf, llama_weights, write_tiny

from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.gguf import place, read_gguf
from mlx_adapters.convert.gguf_blocks import BLOCKS, FROM_PACKAGE, MLX_GROUP, Groups, dense, packed
from mlx_adapters.convert.gguf_families import FAMILIES
from mlx_adapters.convert.gguf_file import read_container
from mlx_adapters.errors import AdaptersError, CheckpointError, ConfigError, UnsupportedError
from mlx_adapters.models.embedded import embedded_model


def smollm() -> Path:
    try:
        return embedded_model()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf", as_written(llama_weights()))


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_blocks_equal_the_reference_bit_for_bit(kind: int) -> None:
    block = BLOCKS[kind]
    random = np.random.default_rng(kind)
    data = random.integers(0, 256, (6, 3, block.width), dtype=np.uint8)
    halves = {10: [80, 82], 11: [108], 14: [208]} | {key: [0, 2] for key in (3, 7, 12, 13)}
    halves |= {key: [0] for key in (2, 6, 8, 20, 23)} | {39: []}
    if kind == 39:  # exponents of numbers that float32 has
        data[..., 0] = random.integers(1, 250, (6, 3))
    for at in halves[kind]:
        values = random.standard_normal((6, 3, 1)).astype(np.float16)
        data[..., at : at + 2] = values.view(np.uint8)
    expected = gguf.quants.dequantize(data.reshape(6, -1), gguf.GGMLQuantizationType(kind))
    groups = block.groups(data.reshape(-1), 6)
    np.testing.assert_array_equal(np.array(dense(groups)), expected)
    if groups.group == MLX_GROUP:
        found = unpacked(groups)
        np.testing.assert_array_equal(np.array(found), expected)


@pytest.mark.parametrize("kind", sorted(FROM_PACKAGE))
def test_blocks_of_the_package_have_its_sizes(kind: int) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == (256, FROM_PACKAGE[kind])


def unpacked(groups: Groups) -> Any:
    wide = {
        name: part.astype(mx.float32) if mx.issubdtype(part.dtype, mx.floating) else part
        for name, part in packed(groups).items()
    }
    return mx.dequantize(
        wide.pop("weight"), **wide, group_size=MLX_GROUP, bits=groups.bits, mode=groups.mode, dtype=mx.float32
    )


def test_scales_stay_exact_when_float16_cannot_hold_them() -> None:
    block = np.zeros((1, 34), dtype=np.uint8)
    block[0, :2] = np.array([1000], dtype=np.float16).view(np.uint8)  # bias -128000 is beyond float16
    block[0, 2:] = np.arange(32, dtype=np.int8).view(np.uint8)
    groups = BLOCKS[8].groups(block.reshape(-1), 1)
    assert packed(groups)["scales"].dtype == packed(groups)["biases"].dtype == mx.float32
    np.testing.assert_array_equal(np.array(unpacked(groups))[0], 1000.0 * np.arange(32))


@pytest.mark.parametrize("kind", [None, "Q8_0", "Q4_1"])
def test_logits_equal_transformers(tmp_path: Path, kind: str | None) -> None:
    """The file's own weights in transformers: catches a wrong row order, epsilon, theta or head."""
    import torch
    from mlx_lm import load
    from transformers import LlamaConfig, LlamaForCausalLM

    quant = None if kind is None else gguf.GGMLQuantizationType[kind]
    plain = {
        name: array
        if quant is None or array.ndim == 1
        else gguf.quants.dequantize(gguf.quants.quantize(array, quant), quant)
        for name, array in llama_weights().items()
    }
    file = write_tiny(tmp_path / "tiny.gguf", as_written(llama_weights()), kind=quant)
    convert(file, tmp_path / "mlx")
    model, tokenizer = load(str(tmp_path / "mlx"))
    model.update(widened(model))
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    reference = LlamaForCausalLM(config).eval()
    state = {hugging(name): torch.from_numpy(array) for name, array in plain.items()}
    lost = reference.load_state_dict(state, strict=False)
    assert lost.missing_keys == ["lm_head.weight"]
    assert not lost.unexpected_keys
    ids = np.random.default_rng(1).integers(0, VOCAB, (2, 50))
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).logits.numpy()
    found = np.array(model(mx.array(ids)))
    assert np.abs(found - expected).max() <= 1e-5 + 1e-5 * np.abs(expected).max()
    assert tokenizer.encode("abc a1 2", add_special_tokens=False) == [32, 31, 33, 29, 34]


def widen(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def widened(model: Any) -> Any:
    from mlx.utils import tree_map

    return tree_map(widen, model.parameters())


def hugging(name: str) -> str:
    (found,) = place(Path("x.gguf"), name, FAMILIES["llama"], 30)
    return found


@pytest.mark.slow
def test_smollm_keeps_every_value(tmp_path: Path) -> None:
    file = smollm()
    kept, plain = (read_gguf(file, keep_quantized=keep) for keep in (True, False))
    assert kept.quantization is not None
    assert kept.quantization["bits"] == 4
    assert kept.quantization["model.embed_tokens"]["bits"] == 8
    assert plain.quantization is None
    assert "lm_head.weight" not in plain.weights
    assert kept.config["tie_word_embeddings"]
    assert kept.config["rms_norm_eps"] == 1e-5
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name in ("token_embd.weight", "blk.3.ffn_down.weight", "blk.29.attn_v.weight"):
        expected = gguf.quants.dequantize(reader[name].data, reader[name].tensor_type)
        np.testing.assert_array_equal(np.array(plain.weights[hugging(name)]), expected)


def test_smollm_answers_in_english(tmp_path: Path) -> None:
    from mlx_lm import generate

    from mlx_adapters.models.load import load

    convert(smollm(), tmp_path / "smollm")
    loaded = load(tmp_path / "smollm")
    text = generate(loaded.model, loaded.tokenizer, "The capital of France is", max_tokens=4)
    assert "Paris" in text
    assert loaded.tokenizer.eos_token == "<|im_end|>"
    chat = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_llama3_rope_factors_become_its_scaling(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = {"rope_type": "llama3", "original_max_position_embeddings": 8192, **numbers}
    rope = {**scaling, "rope_theta": 500000.0}
    config = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, rope_parameters=rope)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    factors = (500000.0 ** -(np.arange(0, 16, 2) / 16) / scaled).astype(np.float32)
    weights = as_written(llama_weights()) | {"rope_freqs.weight": factors}
    found = read_gguf(write_tiny(tmp_path / "a.gguf", weights, theta=500000.0), keep_quantized=True)
    read = found.config["rope_scaling"]
    assert read.pop("rope_type") == scaling.pop("rope_type")
    assert read == pytest.approx(scaling, rel=1e-4)
    weights["rope_freqs.weight"] = factors * np.arange(1, 9, dtype=np.float32)
    with pytest.raises(UnsupportedError, match="rope_freqs"):
        read_gguf(write_tiny(tmp_path / "b.gguf", weights, theta=500000.0), keep_quantized=True)


def test_every_truncation_is_refused_with_the_name(tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 2500, 61), len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(AdaptersError, match=r"cut\.gguf"):
            read_gguf(cut, keep_quantized=True)


def refusal(file: Path, dst: Path) -> str | None:
    try:
        read_gguf(file, keep_quantized=True).write_tokenizer(dst)
    except AdaptersError as error:
        return str(error)
    return None


def test_damaged_bytes_never_escape_as_other_errors(tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    start = min(tensor.begin for tensor in read_container(tiny).tensors.values())
    random = np.random.default_rng(0)
    refused = 0
    for at in random.integers(4, start - 8, 400):
        damaged = bytearray(whole)
        damaged[at : at + 4] = random.integers(0, 256, 4, dtype=np.uint8).tobytes()
        file = tmp_path / "damaged.gguf"
        file.write_bytes(damaged)
        said = refusal(file, tmp_path)
        assert said is None or ("damaged.gguf" in said and "\n" not in said)
        refused += said is not None
    assert refused > 100


@pytest.mark.parametrize("at", [8, 16])
def test_a_huge_count_reserves_no_memory(tiny: Path, at: int) -> None:
    damaged = bytearray(tiny.read_bytes())
    damaged[at : at + 8] = struct.pack("<Q", 2**62)
    tiny.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="more than the file can hold"):
        read_gguf(tiny, keep_quantized=True)


def test_unknown_pre_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    found = read_gguf(
        write_tiny(tmp_path / "a.gguf", as_written(llama_weights()), pre="afmoe"), keep_quantized=True
    )
    with pytest.raises(UnsupportedError, match=r"a\.gguf.*tokenizer\.ggml\.pre.*afmoe"):
        found.write_tokenizer(tmp_path)


def test_wrong_heads_are_refused(tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "a.gguf", as_written(llama_weights()), **{"attention.head_count_kv": 4})
    with pytest.raises(CheckpointError, match="attn_k"):
        read_gguf(file, keep_quantized=True)


def test_tokenizer_config_names_the_special_tokens(tiny: Path, tmp_path: Path) -> None:
    read_gguf(tiny, keep_quantized=True).write_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")
    assert settings["add_bos_token"] is False
