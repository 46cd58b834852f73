"""`convert`: the result computes what the source computes; bad sources and places are named."""

import errno
import json
import shutil
import struct
from collections import namedtuple
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import ARCHS, make_tiny

from mlx_adapters.convert import checkpoint
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.verify import verify_model
from mlx_adapters.errors import CheckpointError, ConfigError, OutputError, UnsupportedError
from mlx_adapters.files import weights, writing
from mlx_adapters.models import load as models

torch = pytest.importorskip("torch")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_tiny("llama", tmp_path / "source")


def left_over(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name != "source")


# What is converted computes the same ------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_equals_transformers(arch: str, tmp_path: Path) -> None:
    source = make_tiny(arch, tmp_path)
    done = convert(source, tmp_path / "out")
    assert (done.dtype, done.bits_per_weight) == ("float32", 32.0)
    verdict = verify_model(source, done.path)
    assert verdict.lossless
    assert verdict.passed, verdict


def test_verify_notices_another_model(llama: Path, tmp_path: Path) -> None:
    other = make_tiny("llama", tmp_path / "other", seed=1)
    verdict = verify_model(other, convert(llama, tmp_path / "out").path)
    assert not verdict.passed
    assert verdict.max_diff > 1e-2


def test_verify_notices_a_lost_theta(llama: Path, tmp_path: Path) -> None:
    out = convert(llama, tmp_path / "out").path
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"].pop("rope_theta") == 777.0
    (out / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0}))
    assert verify_model(llama, out).max_diff > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_precision_is_kept_and_the_bits_are_the_same(dtype: str, tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path, dtype=dtype)
    done = convert(source, tmp_path / "out")
    assert done.dtype == dtype
    before, after = mx.load(str(source / "model.safetensors")), mx.load(str(done.path / "model.safetensors"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype
        assert bool(mx.array_equal(array, after[name]))


def test_dtype_changes_it(llama: Path, tmp_path: Path) -> None:
    done = convert(llama, tmp_path / "out", dtype="bfloat16")
    assert (done.dtype, done.bits_per_weight) == ("bfloat16", 16.0)
    verdict = verify_model(llama, done.path)
    assert not verdict.lossless
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        (
            {"bits": bits, "group_size": 32},
            bits + 0.9,
            bits + 3.0,
        )  # + a float32 scale and bias for 32 weights
        for bits in (2, 3, 4, 5, 6, 8)
    ]
    + [
        ({"mode": "mxfp4"}, 4.0, 5.0),
        ({"mode": "mxfp8"}, 8.0, 9.0),
        ({"mode": "nvfp4"}, 4.0, 5.5),
        ({"recipe": "mixed_3_6", "group_size": 32}, 5.0, 8.0),
    ],
    ids=str,
)
def test_quantized_models_compute_what_their_weights_say(
    options: dict[str, Any], low: float, high: float, llama: Path, tmp_path: Path
) -> None:
    done = convert(llama, tmp_path / "out", **options)
    assert low < done.bits_per_weight < high
    assert done.bytes < sum(file.stat().st_size for file in llama.iterdir())
    verdict = verify_model(llama, done.path)
    assert not verdict.lossless
    assert verdict.passed, verdict


def test_a_quantized_folder_converts_again_unchanged(llama: Path, tmp_path: Path) -> None:
    first = convert(llama, tmp_path / "first", recipe="mixed_3_6", group_size=32).path
    second = convert(first, tmp_path / "second").path
    left, right = (mx.load(str(folder / "model.safetensors")) for folder in (first, second))
    assert left.keys() == right.keys()
    assert all(bool(mx.array_equal(left[name], right[name])) for name in left)
    with pytest.raises(UnsupportedError, match="already quantized"):
        convert(first, tmp_path / "third", bits=2, group_size=32)
    with pytest.raises(UnsupportedError, match="quantized for MLX already"):
        verify_model(first, second)


def test_shards_and_the_end_of_a_turn(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = make_tiny("llama", tmp_path)
    whole = convert(source, tmp_path / "whole").path
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="20KB")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert len(list(source.glob("model-*.safetensors"))) > 2
    sharded = convert(source, tmp_path / "sharded").path
    left, right = (mx.load(str(folder / "model.safetensors")) for folder in (whole, sharded))
    assert left.keys() == right.keys()
    assert all(bool(mx.array_equal(left[name], right[name])) for name in left)
    assert models.load(sharded).config["eos_token_id"] == [2, 5]


def test_a_bin_checkpoint_is_read(tmp_path: Path) -> None:
    pytest.importorskip("mlx_adapters.files.torch_bin")
    from safetensors.torch import load_file

    source = make_tiny("llama", tmp_path)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    expected = convert(source, tmp_path / "expected").path
    (source / "model.safetensors").unlink()
    done = convert(source, tmp_path / "out")
    left, right = (mx.load(str(folder / "model.safetensors")) for folder in (expected, done.path))
    assert all(bool(mx.array_equal(left[name], right[name])) for name in left)


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi"])
def test_transformers_opens_the_converted_folder(arch: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = make_tiny(arch, tmp_path)
    out = convert(source, tmp_path / "out").path
    ids = torch.arange(4, 60)[None]
    logits = []
    for folder in (source, out):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager"
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with torch.no_grad():
            logits.append(model(ids).logits.numpy())
    assert np.array_equal(*logits)


# Bad sources ------------------------------------------------------------------------------------------------


def refused(
    source: Path, tmp_path: Path, match: str, kind: type[Exception] = CheckpointError, **options: Any
) -> None:
    with pytest.raises(kind, match=match) as raised:
        convert(source, tmp_path / "out", **options)
    assert "\n" not in str(raised.value)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(keep: int, llama: Path, tmp_path: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(llama, tmp_path, r"model\.safetensors: is truncated")


@pytest.mark.parametrize("content", [b"x" * 50, b"[1, 2]".ljust(50), b"\xff" * 50])
def test_a_file_that_is_no_safetensors_is_named(content: bytes, llama: Path, tmp_path: Path) -> None:
    (llama / "model.safetensors").write_bytes(struct.pack("<Q", 50) + content)
    refused(llama, tmp_path, r"model\.safetensors: is not a safetensors file")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [None, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {},
        7,
    ],
    ids=str,
)
def test_a_tensor_that_does_not_fit_its_bytes_is_named(entry: Any, llama: Path, tmp_path: Path) -> None:
    head = json.dumps({"w": entry}).encode()
    (llama / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(4))
    refused(llama, tmp_path, "tensor 'w'")


def _rewrite(folder: Path, change: Any) -> None:
    weights = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def test_wrong_shapes_and_names_are_listed(llama: Path, tmp_path: Path) -> None:
    def change(weights: dict[str, mx.array]) -> None:
        weights["model.norm.weight"] = mx.zeros((31,))
        weights["model.extra.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")

    _rewrite(llama, change)
    refused(llama, tmp_path, r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight; 1 unknown: model\.extra")
    _rewrite(llama, lambda weights: weights.pop("model.extra.weight"))
    refused(llama, tmp_path, r"1 wrong shape: model\.norm\.weight \(31,\) instead of \(32,\)")


def _index(folder: Path, mapping: Any) -> None:
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": mapping}))


def test_the_index_is_checked(llama: Path, tmp_path: Path) -> None:
    (llama / "model.safetensors").rename(llama / "part.safetensors")
    _index(llama, {"a": "model-00001-of-00002.safetensors", "b": "part.safetensors"})
    refused(llama, tmp_path, r"1 of 2 shards are missing \(model-00001-of-00002\.safetensors\)")
    _index(llama, {"a": "../secret.safetensors"})
    refused(llama, tmp_path, "outside the folder")
    _index(llama, {"a": "part.safetensors"})
    refused(llama, tmp_path, "'a' is in part.safetensors, which does not have it")
    _index(llama, 3)
    refused(llama, tmp_path, "weight_map")


@pytest.mark.parametrize(
    ("value", "options", "match"),
    [
        (1e5, {"dtype": "float16"}, r"values beyond 65504, the largest of float16\. Use bfloat16"),
        (float("nan"), {}, "holds NaN"),
        (float("nan"), {"bits": 4, "group_size": 32}, "holds NaN"),
        (float("inf"), {"bits": 4, "group_size": 32}, "holds infinity"),
        (float("-inf"), {"dtype": "bfloat16"}, "holds infinity"),
    ],
    ids=str,
)
def test_weights_that_are_not_finite_are_not_written(
    value: float, options: dict[str, Any], match: str, llama: Path, tmp_path: Path
) -> None:
    """Four bits would hide a NaN: the scale of its group is the largest of the others."""
    name = "model.layers.0.mlp.down_proj.weight"

    def change(weights: dict[str, mx.array]) -> None:
        weights[name][0, 0] = value
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.array([float("inf")])  # not taken

    _rewrite(llama, change)
    refused(llama, tmp_path, f"{name} .*{match}", **options)


@pytest.mark.parametrize(
    ("absent", "match"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_a_missing_file_is_named(absent: str, match: str, llama: Path, tmp_path: Path) -> None:
    (llama / absent).unlink()
    refused(llama, tmp_path, match)


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", tmp_path, "no such folder")
    refused(tmp_path / "nothing.gguf", tmp_path, "no such file")


def test_code_in_a_checkpoint_never_runs(llama: Path, tmp_path: Path) -> None:
    witness = llama / "ran"
    (llama / "evil.py").write_text(f"open({str(witness)!r}, 'w')")
    config = json.loads((llama / "config.json").read_text())
    evil = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (llama / "config.json").write_text(json.dumps(config | evil | {"model_type": "evil"}))
    refused(llama, tmp_path, "never run", UnsupportedError)
    (llama / "config.json").write_text(json.dumps(config | {"model_file": "evil.py"}))
    refused(llama, tmp_path, "model_file", UnsupportedError)
    (llama / "config.json").write_text(json.dumps(config | evil))
    out = convert(llama, tmp_path / "out").path  # a known architecture: MLX's own code, theirs ignored
    assert not list(out.glob("*.py"))
    assert not witness.exists()


# Bad options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 7}, "--bits 7 is not one of 2, 3, 4, 5, 6, 8"),
        ({"bits": 4, "group_size": 48}, "--group-size 48"),
        ({"group_size": 32}, "without --bits"),
        ({"mode": "mxfp4", "bits": 8}, "for mode mxfp4"),
        ({"mode": "fp4"}, "--mode 'fp4'"),
        ({"dtype": "float64"}, "--dtype 'float64'"),
        ({"recipe": "mixed"}, "--recipe 'mixed'"),
        ({"recipe": "mixed_3_6", "bits": 4}, "without --bits"),
        ({"bits": 4, "group_size": 128}, "nothing was quantized"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], match: str, llama: Path, tmp_path: Path) -> None:
    refused(llama, tmp_path, match, ConfigError, **options)


# The place to write to --------------------------------------------------------------------------------------


def test_an_existing_output_is_left_alone(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="not empty"):
        convert(llama, out)
    assert left_over(tmp_path) == ["out"]
    assert [file.read_text() for file in out.iterdir()] == ["precious"]
    (out / "mine.txt").unlink()
    convert(llama, out)  # an empty folder is fine
    assert left_over(tmp_path) == ["out"]


def test_a_file_in_the_way(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(OutputError, match="not a folder"):
        convert(llama, tmp_path / "out")
    with pytest.raises(OutputError, match="cannot be written"):
        convert(llama, tmp_path / "out" / "deeper")
    assert (tmp_path / "out").read_text() == "precious"


def test_a_disk_too_small_is_found_before_writing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    refused(llama, tmp_path, r"out: needs about \d+ kB, and 1 kB are free", OutputError)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[write] Unable to write 9 bytes")],
)
def test_a_disk_that_fills_up_while_writing(
    error: Exception, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "_save", full)
    refused(llama, tmp_path, "no space left", OutputError)


def test_other_errors_pass_through_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(FileNotFoundError), writing.writing(tmp_path / "out"):
        (tmp_path / "source" / "absent").read_text()
    with pytest.raises(KeyboardInterrupt):
        _interrupted(tmp_path / "out")
    assert left_over(tmp_path) == []


def _interrupted(dst: Path) -> None:
    with writing.writing(dst) as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
