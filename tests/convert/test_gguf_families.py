"""GGUF of the families people adapt: logits of the file against transformers, and what is refused.

The file is written from the converter's rules (`gguf_writing`); the slow run compares it, tensor by tensor,
with what llama.cpp's own converter writes, where `MLX_ADAPTERS_LLAMA_CPP` names a checkout.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from families import TEXT, make_family, opened
from gguf_cases import CASES
from gguf_writing import ARCHS, converted_by_llama_cpp, write_gguf
from mlx.utils import tree_flatten
from tiny_gguf import as_written, gguf, llama_weights, write_tiny

from mlx_adapters.convert import verify
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.gguf import family_in, place, read_gguf
from mlx_adapters.convert.gguf_families import FAMILIES
from mlx_adapters.convert.gguf_file import read_container
from mlx_adapters.convert.verify import verify_model
from mlx_adapters.errors import CheckpointError, UnsupportedError
from mlx_adapters.models.load import load
from mlx_adapters.models.names import names_of

CHECKOUT = os.environ.get("MLX_ADAPTERS_LLAMA_CPP")
FAST = ("qwen3_5_moe_text", "gemma3_text", "gemma4_text:experts", "gpt_oss", "granitemoehybrid", "ministral3")
EVERY = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model of a family, in a folder of its own."""
    return _made(request.param, tmp_path_factory.mktemp("family"))


def _made(name: str, folder: Path) -> Path:
    made = make_family(name, folder, **CASES[name])
    if name.startswith("granitemoehybrid"):  # llama.cpp reads the published names
        text = (made / "config.json").read_text()
        for new, old in (("linear_attention", "mamba"), ("full_attention", "attention")):
            text = text.replace(f'"{new}"', f'"{old}"')
        (made / "config.json").write_text(text)
    return made


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() <= 1e-5 + 1e-5 * np.abs(expected).max())


def our_logits(folder: Path) -> np.ndarray:
    return np.array(load(folder).model(mx.array(TEXT)).astype(mx.float32))


def their_logits(folder: Path) -> np.ndarray:
    import torch

    with torch.no_grad():
        found: np.ndarray = opened(folder)(torch.tensor(TEXT)).logits.numpy()
    return found


@pytest.mark.parametrize("source", EVERY, indirect=True)
def test_logits_equal_transformers(source: Path, tmp_path: Path) -> None:
    expected = their_logits(source)
    assert np.abs(expected).max() > 1
    convert(write_gguf(source, tmp_path / "m.gguf"), tmp_path / "mlx")
    assert close(our_logits(tmp_path / "mlx"), expected)


@pytest.mark.slow
@pytest.mark.skipif(CHECKOUT is None, reason="needs MLX_ADAPTERS_LLAMA_CPP, a checkout of llama.cpp")
@pytest.mark.parametrize("source", list(CASES), indirect=True)
def test_llama_cpp_writes_the_same_tensors(source: Path, tmp_path: Path) -> None:
    _byte_level_tokenizer(source)
    theirs = converted_by_llama_cpp(Path(str(CHECKOUT)), source, tmp_path / "theirs.gguf")
    ours = write_gguf(source, tmp_path / "ours.gguf")
    found, expected = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors} for file in (ours, theirs)
    )
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, err_msg=name)
    convert(theirs, tmp_path / "mlx")
    assert close(our_logits(tmp_path / "mlx"), their_logits(source))


def _byte_level_tokenizer(folder: Path) -> None:
    """A tokenizer of the kind that the converter reads, in the place of the folder's."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = json.loads((folder / "config.json").read_text())
    size = config.get("text_config", config)["vocab_size"]
    names = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(ord("a"), ord("z") + 1)), "ab"]
    names += [f"u{place}" for place in range(size - len(names))]
    tokenizer = Tokenizer(models.BPE({name: place for place, name in enumerate(names)}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


# transformers' own reader ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("source", list(CASES), indirect=True)
def test_what_transformers_reads_right_is_known(source: Path, tmp_path: Path) -> None:
    """Where it does, given our configuration, --verify compares with it; else it says that it cannot."""
    file = write_gguf(source, tmp_path / "m.gguf")
    convert(file, tmp_path / "mlx")
    family, found = family_in(read_container(file))
    with patch.object(verify, "family_in", lambda container: (replace(family, in_transformers=True), found)):
        try:
            theirs = verify._gguf_logits(file, TEXT, tmp_path / "mlx")
        except Exception:  # whatever transformers raises for what it does not know
            theirs = []
    right = bool(theirs) and close(np.stack(theirs), their_logits(source))
    assert right == family.in_transformers
    if not right:
        with pytest.raises(UnsupportedError, match=f"'{found.arch}'"):
            verify_model(file, tmp_path / "mlx")


def test_verify_of_a_file_compares_scaled_rotations_and_windows(tmp_path: Path) -> None:
    """transformers drops both when it reads a file by itself."""
    file = write_gguf(_made("gemma3_text", tmp_path), tmp_path / "m.gguf")
    convert(file, tmp_path / "mlx")
    verdict = verify_model(file, tmp_path / "mlx")
    assert verdict.passed
    assert verdict.lossless


# Quantized files -------------------------------------------------------------------------------------------


def _plain(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The values of a model's parameters, however they are held."""
    weights = dict(tree_flatten(model.parameters()))
    modules = dict(model.named_modules())
    for name, array in weights.items():
        module = modules[name.rpartition(".")[0]]
        if name.endswith((".scales", ".biases")) and hasattr(module, "bits"):
            continue
        if name.endswith(".weight") and hasattr(module, "bits"):
            wide = (part if part.dtype == mx.uint8 else part.astype(mx.float32) for part in _scales(module))
            groups = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            array = mx.dequantize(array, *wide, **groups, dtype=mx.float32)
        yield name, np.array(array.astype(mx.float32))


def _scales(module: Any) -> list[mx.array]:
    return [module.scales] if module.get("biases") is None else [module.scales, module.biases]


@pytest.mark.parametrize(
    ("source", "kind"),
    [("qwen3_5_moe_text", "Q8_0"), ("gpt_oss", "MXFP4"), ("granitemoehybrid", "Q4_1")],
    indirect=["source"],
)
def test_groups_keep_the_values_of_the_file(source: Path, tmp_path: Path, kind: str) -> None:
    """Stacks of experts, ordered heads and joined matrices stay quantized; each value is the file's."""
    file = write_gguf(source, tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType[kind])
    convert(file, tmp_path / "kept")
    convert(file, tmp_path / "plain", dtype="float32")
    kept, plain = (load(tmp_path / name).model for name in ("kept", "plain"))
    quantized = {type(module).__name__ for module in kept.modules() if hasattr(module, "bits")}
    assert {"QuantizedLinear", "QuantizedEmbedding"} < quantized
    assert any("Switch" in name for name in quantized)
    expected = dict(_plain(plain))
    for name, array in _plain(kept):
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert close(our_logits(tmp_path / "kept"), our_logits(tmp_path / "plain"))
    convert(source, tmp_path / "hf")  # an exported adapter has the same names from either
    assert names_of(kept) == names_of(load(tmp_path / "hf").model)


def test_a_type_of_the_package_becomes_plain(tmp_path: Path) -> None:
    from mlx_adapters.convert.gguf_blocks import dequantized

    random = np.random.default_rng(0)
    raw = random.integers(0, 256, (4, 66), dtype=np.uint8)
    raw[:, :2] = np.array([0.5], dtype=np.float16).view(np.uint8)
    kind = gguf.GGMLQuantizationType.IQ2_XXS
    found = dequantized(raw.reshape(-1), int(kind), (2, 2, 256))
    np.testing.assert_array_equal(np.array(found).reshape(4, 256), gguf.quants.dequantize(raw, kind))


# Refusals --------------------------------------------------------------------------------------------------


def test_every_family_has_a_case_and_a_line_of_the_page() -> None:
    assert set(ARCHS.values()) == set(FAMILIES)
    assert {name.partition(":")[0] for name in CASES} >= set(ARCHS) - {"mistral"}  # mistral3's text
    page = (Path(__file__).parents[2] / "docs" / "gguf.md").read_text(encoding="utf-8")
    lines = dict(re.findall(r"^\| `(\S+)` \| (.*) \|$", page, re.MULTILINE))
    lines.pop("general.architecture", None)
    assert {arch: set(types.split(", ")) for arch, types in lines.items()} == {
        arch: {kind for kind, name in ARCHS.items() if name == arch} for arch in FAMILIES
    }
    (stated,) = re.findall(r"the tensors of some architectures \(([^)]*)\)", page)
    assert set(stated.split()) == {f"{a}," for a, f in FAMILIES.items() if f.in_transformers} ^ {
        "phi3,",
        "phi3",
    }


def refused(file: Path, match: str) -> None:
    with pytest.raises(UnsupportedError, match=match) as error:
        read_gguf(file, keep_quantized=True)
    assert "\n" not in str(error.value)
    assert file.name in str(error.value)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"rope.scaling.type": "other"}, "rope scaling 'other'"),
        ({"attention.causal": False}, "both directions"),
        ({"attention.value_length": 8}, "keys and values of different widths"),
    ],
)
def test_what_is_not_read_is_refused_in_one_line(tmp_path: Path, fields: dict[str, Any], match: str) -> None:
    refused(write_tiny(tmp_path / "a.gguf", as_written(llama_weights()), fields=fields), match)


@pytest.mark.parametrize("name", ["blk.1", "blk.x.attn_q.weight", "blk.0.attn_q.weigh", "other", "blk."])
def test_a_tensor_of_no_model_is_refused_by_name(tmp_path: Path, name: str) -> None:
    weights = as_written(llama_weights()) | {name: np.ones(3, np.float32)}
    refused(write_tiny(tmp_path / "a.gguf", weights), f"tensor '{name}' belongs to no")


def test_parts_that_do_not_fit_are_an_error_of_the_file(tmp_path: Path) -> None:
    from mlx_adapters.convert import gguf as reader

    halves = {0: mx.zeros((4, 8)), 1: mx.zeros((4, 6))}
    with pytest.raises(CheckpointError, match=r"x\.gguf: the halves of m do not fit"):
        reader._joined(Path("x.gguf"), "m", halves, FAMILIES["granitehybrid"], {})


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "a.gguf", as_written(llama_weights()), arch="gptneox")
    refused(file, "'gptneox'.*Known: .*qwen35moe")


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """Files of Qwen 3.5 have one more block than the model has layers."""
    fields = {"nextn_predict_layers": 1}
    weights = as_written(llama_weights())
    extra = {f"blk.2.{name}.weight": np.ones(64, np.float32) for name in ("attn_norm", "nextn.enorm")}
    file = write_tiny(tmp_path / "a.gguf", weights | extra, fields=fields, block_count=3)
    found = read_gguf(file, keep_quantized=True)
    assert found.config["num_hidden_layers"] == 2
    assert not any(".2." in name for name in found.weights)
    with pytest.raises(UnsupportedError, match=r"blk\.1\.nextn\.enorm"):
        place(file, "blk.1.nextn.enorm.weight", FAMILIES["llama"], 2)


def in_parts(folder: Path) -> list[Path]:
    """The tiny llama in three files, as llama.cpp writes large models."""
    whole = gguf.GGUFReader(write_tiny(folder / "whole.gguf", as_written(llama_weights())))
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=8)
    for name, found in whole.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            inner = found.types[1] if len(found.types) > 1 else None
            writer.add_key_value(name, found.contents(), found.types[0], sub_type=inner)
    for tensor in whole.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("m-*.gguf"))


def test_a_file_in_parts_is_read_from_any_of_them(tmp_path: Path) -> None:
    parts = in_parts(tmp_path)
    assert [part.name for part in parts] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    expected = read_gguf(tmp_path / "whole.gguf", keep_quantized=True)
    for part in parts:
        found = read_gguf(part, keep_quantized=True)
        assert found.config == expected.config
        assert found.weights.keys() == expected.weights.keys()
        for name, array in found.weights.items():
            np.testing.assert_array_equal(np.array(array), np.array(expected.weights[name]))
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf: no such file; it is part 2 of 3"):
        read_gguf(parts[0], keep_quantized=True)
    with pytest.raises(CheckpointError, match=r"should end with -00001-of-00003\.gguf"):
        read_gguf(parts[0].rename(tmp_path / "other.gguf"), keep_quantized=True)
