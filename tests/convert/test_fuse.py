"""Fused checkpoints: opened by transformers with every name found, and the same logits."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from adapted import IDS, attached, bound, logits
from cases import METHODS, Method, pairs, sampled
from in_transformers import in_torch
from mlx.utils import tree_flatten
from samples import sample, sample_config
from tiny import make_tiny, make_tokenizer
from typer.testing import CliRunner

from mlx_adapters import adapter
from mlx_adapters.cli.app import app
from mlx_adapters.convert import against_torch, to_transformers
from mlx_adapters.convert import fuse as fused
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.fuse import fuse
from mlx_adapters.convert.to_transformers import CHECKED, write_transformers
from mlx_adapters.errors import ConfigError, OutputError, UnsupportedError
from mlx_adapters.models import load as model
from mlx_adapters.models.architectures.row import Architecture


def saved(folder: Path, case: str, dst: Path) -> np.ndarray:
    loaded, meta = attached(folder, METHODS[case], trained=True)
    adapter.save(loaded.model, dst, meta=meta)
    return logits(loaded)


# the first row of every method that can be merged
_FIRST = {METHODS[case].name: case for case, _ in reversed(pairs(mergeable=True))}.values()


@pytest.mark.parametrize(
    ("case", "arch"), sampled([pair for pair in pairs(mergeable=True) if pair[0] in _FIRST])
)
def test_transformers_opens_it(case: str, arch: str, folders: dict[str, Path], tmp_path: Path) -> None:
    expected = saved(folders[arch], case, tmp_path / "a")
    done = fuse(folders[arch], tmp_path / "a", tmp_path / "fused")
    np.testing.assert_allclose(in_torch(tmp_path / "fused"), expected, atol=bound(expected))
    assert done.effect > 1e-2
    assert done.error <= bound(expected)


@pytest.mark.parametrize("arch", sorted(CHECKED & set(tiny._FIELDS)))
def test_a_checkpoint_is_written_as_it_was_read(arch: str, tmp_path: Path) -> None:
    """What transformers saved, mlx-lm's names and layout, and back: tensor by tensor, bit for bit."""
    # in two layers transformers' usual pattern has no full one, without which mlx-lm's files do not run
    kinds = ["sliding_attention", "full_attention"]
    more = {"layer_types": kinds} if arch in ("cohere2", "gemma3_text") else {}
    source = make_tiny(arch, tmp_path, **more)
    loaded = model.load(source)
    written = write_transformers(loaded.model, loaded.config, tmp_path / "again")
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (source, written))
    assert set(before) == set(after)
    for name, array in before.items():
        assert mx.array_equal(array, after[name]), name


@pytest.mark.parametrize("arch", sorted(CHECKED - set(tiny._FIELDS)))
def test_transformers_finds_every_name(arch: str, tmp_path: Path) -> None:
    mx.random.seed(0)
    network, config = sample(arch), sample_config(arch) | {"pad_token_id": 0}
    write_transformers(network, config, tmp_path / "torch")
    expected = np.array(network(IDS))
    np.testing.assert_allclose(in_torch(tmp_path / "torch"), expected, atol=bound(expected))


def in_folder(arch: str, folder: Path) -> Path:
    """A tiny model of an architecture that only mlx-lm is asked to read."""
    mx.random.seed(0)
    folder.mkdir(parents=True)
    make_tokenizer(folder)
    network = sample(arch)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(network.parameters())))
    (folder / "config.json").write_text(json.dumps(sample_config(arch)))
    return folder


@pytest.mark.parametrize("arch", ["deepseek_v3", "internlm2"])
def test_names_that_nobody_checked_are_not_written(arch: str, tmp_path: Path) -> None:
    """Transformers would open such a folder with random weights and only log it; MLX reads it."""
    base = in_folder(arch, tmp_path / "base")
    expected = saved(base, "lora-default-targets", tmp_path / "a")
    with pytest.raises(UnsupportedError, match=rf"{arch} checkpoint.*--to mlx"):
        fuse(base, tmp_path / "a", tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
    done = fuse(base, tmp_path / "a", tmp_path / "fused", to="mlx")
    assert done.error <= bound(expected) < done.effect


def test_names_that_are_known_of_the_family_are_written_and_checked(tmp_path: Path) -> None:
    """A hybrid in MLX's names, with norms one larger and a turned convolution, which its folder says not."""
    base = in_folder("qwen3_next", tmp_path / "base")
    expected = saved(base, "lora-default-targets", tmp_path / "a")
    done = fuse(base, tmp_path / "a", tmp_path / "fused")
    assert done.torch_diff is not None
    assert done.torch_diff <= done.bound < done.effect
    np.testing.assert_allclose(in_torch(tmp_path / "fused"), expected, atol=bound(expected))


def test_an_unchecked_architecture_is_checked_on_the_spot(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "CHECKED", frozenset())
    saved(folders["qwen2"], "lora", tmp_path / "a")
    done = fuse(folders["qwen2"], tmp_path / "a", tmp_path / "fused")
    assert done.torch_diff is not None
    assert 0 < done.torch_diff <= done.bound
    monkeypatch.setattr(against_torch, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"qwen2 checkpoint must be checked .* not installed"):
        fuse(folders["qwen2"], tmp_path / "a", tmp_path / "again")


def test_the_check_can_fail(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-J's names left as MLX has them: transformers finds none of them."""
    monkeypatch.setattr(to_transformers, "checkpoint_tensors", lambda names, weights: {})
    monkeypatch.setattr(Architecture, "to_hf", lambda self, path: path)
    saved(folders["llama"], "lora", tmp_path / "l")
    saved(folders["gptj"], "lora", tmp_path / "a")
    with pytest.raises(UnsupportedError, match="transformers finds missing"):
        fuse(folders["gptj"], tmp_path / "a", tmp_path / "fused", verify=True)
    monkeypatch.undo()
    real = fused._sums

    def shifted(network: Any, dtype: str) -> Any:
        for name, array in real(network, dtype):
            yield name, (0, *array[1:]) if name == "model.norm.weight" and not seen else array
        seen.append(1)

    seen: list[int] = []
    monkeypatch.setattr(fused, "_sums", shifted)
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight is read back"):
        fuse(folders["llama"], tmp_path / "l", tmp_path / "fused")


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_experts_get_their_names_back(arch: str, tmp_path: Path) -> None:
    """mlx-lm stacks the experts; transformers would fill unknown names with noise and only log it."""
    convert(make_tiny(arch, tmp_path), tmp_path / "mlx")
    expected = saved(tmp_path / "mlx", "lora-default-targets", tmp_path / "a")
    fuse(tmp_path / "mlx", tmp_path / "a", tmp_path / "fused")
    np.testing.assert_allclose(in_torch(tmp_path / "fused"), expected, atol=bound(expected))


EVERYWHERE = Method("lora", {"rank": 4, "targets": "embed_tokens,q_proj", "modules_to_save": "lm_head"})


def test_embedding_and_head(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded, meta = attached(folders["llama"], EVERYWHERE, trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    expected = logits(loaded)
    fuse(folders["llama"], tmp_path / "a", tmp_path / "fused")
    np.testing.assert_allclose(in_torch(tmp_path / "fused"), expected, atol=bound(expected))


@pytest.mark.parametrize("to", ["transformers", "mlx"])
def test_a_tied_embedding_is_refused(to: str, tmp_path: Path) -> None:
    """PEFT adapts the embedding alone: merged, the head that shares its weight would change too."""
    base = make_tiny("llama", tmp_path, tie_word_embeddings=True)
    loaded, meta = attached(base, Method("lora", {"targets": "embed_tokens"}), trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    with pytest.raises(ConfigError, match=r"lora cannot be fused: at model.embed_tokens, .* tied"):
        fuse(base, tmp_path / "a", tmp_path / "fused", to=to)
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_base_is_written_out_first(bits: int, folders: dict[str, Path], tmp_path: Path) -> None:
    convert(folders["llama"], tmp_path / "q", bits=bits, group_size=32)
    expected = saved(tmp_path / "q", "lora", tmp_path / "a")
    fuse(tmp_path / "q", tmp_path / "a", tmp_path / "fused")
    np.testing.assert_allclose(in_torch(tmp_path / "fused"), expected, atol=bound(expected))


def test_quantizing_anew_is_reported(folders: dict[str, Path], tmp_path: Path) -> None:
    convert(folders["llama"], tmp_path / "q", bits=4, group_size=32)
    expected = saved(tmp_path / "q", "lora", tmp_path / "a")
    plain = fuse(tmp_path / "q", tmp_path / "a", tmp_path / "dense", to="mlx")
    four = fuse(tmp_path / "q", tmp_path / "a", tmp_path / "four", to="mlx", bits=4, group_size=32)
    assert plain.error <= bound(expected)
    assert four.error > 100 * plain.error, "four bits round more than float32 does"
    assert four.error_rms < four.error
    loaded = model.load(tmp_path / "four")
    assert np.abs(np.array(loaded.model(IDS)) - expected).max() > 10 * bound(expected)
    assert four.bytes < plain.bytes


@pytest.mark.parametrize("field", ["dtype", "torch_dtype", ""])
def test_precision_is_the_base_s(field: str, tmp_path: Path) -> None:
    """Of its weights, whatever config.json calls it."""
    base = make_tiny("llama", tmp_path, dtype="bfloat16")
    config = json.loads((base / "config.json").read_text())
    kept = {k: v for k, v in config.items() if k != "dtype"} | ({field: "bfloat16"} if field else {})
    (base / "config.json").write_text(json.dumps(kept))
    saved(base, "lora", tmp_path / "a")
    done = fuse(base, tmp_path / "a", tmp_path / "fused")
    assert done.dtype == "bfloat16"
    arrays = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    assert {array.dtype for array in arrays.values()} == {mx.bfloat16}


def test_large_checkpoints_are_sharded(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = model.load(folders["llama"])
    write_transformers(loaded.model, loaded.config, tmp_path / "parts", shard=20_000)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    np.testing.assert_allclose(in_torch(tmp_path / "parts"), np.array(loaded.model(IDS)), atol=1e-4)


@pytest.mark.parametrize("case", ["series", "parallel", "seq_bn", "prefix", "prompt"])
def test_what_is_no_weight_is_refused_by_name(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    saved(folders["llama"], case, tmp_path / "a")
    with pytest.raises(ConfigError, match=f"{case} cannot be fused"):
        fuse(folders["llama"], tmp_path / "a", tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_refusals(folders: dict[str, Path], tmp_path: Path) -> None:
    saved(folders["llama"], "lora", tmp_path / "a")
    with pytest.raises(ConfigError, match="Known: mlx, transformers"):
        fuse(folders["llama"], tmp_path / "a", tmp_path / "f", to="mxl")
    with pytest.raises(ConfigError, match="int8"):
        fuse(folders["llama"], tmp_path / "a", tmp_path / "f", dtype="int8")
    with pytest.raises(ConfigError, match="--to transformers"):
        fuse(folders["llama"], tmp_path / "a", tmp_path / "f", to="mlx", verify=True)
    with pytest.raises(ConfigError, match="--to mlx"):
        fuse(folders["llama"], tmp_path / "a", tmp_path / "f", bits=4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="full"):
        fuse(folders["llama"], tmp_path / "a", tmp_path / "full")


def test_commands(folders: dict[str, Path], tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done.stdout

    expected = saved(folders["llama"], "lora", tmp_path / "a")
    said = run("fuse", folders["llama"], tmp_path / "f", "--adapter", tmp_path / "a", "--verify")
    assert "14 layers fused" in said
    assert "passed" in said
    run("export", tmp_path / "a", tmp_path / "m", "--format", "mlx-lm")
    said = run("import", tmp_path / "m", tmp_path / "back", "--model", folders["llama"])
    assert "lora, from a folder of mlx-lm" in said
    loaded = model.load(folders["llama"])
    adapter.load(loaded, tmp_path / "back")
    loaded.model.eval()
    assert np.array_equal(logits(loaded), expected)
    saved(folders["llama"], "series", tmp_path / "s")
    said = run("export", tmp_path / "s", tmp_path / "p", "--base", "owner/base")
    assert "load_adapter.py" in said
    assert "--format adapterhub, or export it with --format llm-adapters" in said
    assert (tmp_path / "p" / "load_adapter.py").exists()
    card = (tmp_path / "p" / "README.md").read_text()
    assert "load_adapter(base" in card
    assert "PeftModel" not in card
    assert "library_name" not in card
    run("export", tmp_path / "a", tmp_path / "q", "--base", "owner/base")
    card = (tmp_path / "q" / "README.md").read_text()
    assert "PeftModel.from_pretrained(base" in card
    assert "library_name: peft" in card
