"""Every method on every architecture: what it trains, what it computes, and what PyTorch makes of it."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cases import ARCHITECTURES, METHODS, Method
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from tiny import make_tiny

from mlx_adapters import adapter, methods, model
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.convert import peft
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.errors import AdapterError, ConfigError
from mlx_adapters.methods.base import resolve_targets

IDS = mx.array([[4, 5, 6, 7, 8, 9, 10, 11], [11, 10, 9, 8, 7, 6, 5, 4]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each architecture, converted."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for arch in ARCHITECTURES:
        made[arch] = root / f"mlx-{arch}"
        convert(make_tiny(arch, root), made[arch])
    return made


def attached(folder: Path, method: Method, *, trained: bool) -> tuple[model.Loaded, AdapterMeta]:
    loaded = model.load(folder)
    config = methods.make_config(method.name, method.fields)
    base = model.describe(loaded)
    mx.random.seed(3)
    adapter.attach(loaded.model, method.name, config, base=base)
    if trained:
        change(loaded.model)
    loaded.model.eval()
    return loaded, AdapterMeta(method=method.name, config=vars(config), base=base, template="plain")


def change(network: nn.Module) -> None:
    """Move every adapter array away from its start, as training would."""
    for path, array in tree_flatten(network.trainable_parameters()):
        network.update(nested(path, array + 0.1 * mx.random.normal(array.shape)), strict=False)


def nested(path: str, array: mx.array) -> Any:
    return tree_unflatten([(path, array)])


def logits(loaded: model.Loaded) -> np.ndarray:
    return np.array(loaded.model(IDS))


def test_every_method_has_a_row() -> None:
    assert {case.name for case in METHODS.values()} == set(methods.names())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", METHODS)
class TestMethod:
    def test_a_fresh_adapter_is_the_base(self, arch: str, case: str, folders: dict[str, Path]) -> None:
        method = METHODS[case]
        base = logits(model.load(folders[arch]))
        fresh = logits(attached(folders[arch], method, trained=False)[0])
        changed = logits(attached(folders[arch], method, trained=True)[0])
        assert np.array_equal(base, fresh) == method.identity
        assert np.abs(changed - base).max() > 1e-2

    def test_only_the_adapter_trains_and_all_of_it(
        self, arch: str, case: str, folders: dict[str, Path]
    ) -> None:
        loaded, _ = attached(folders[arch], METHODS[case], trained=True)
        layers = adapter.layers(loaded.model)
        names = {f"{path}.{name}" for path, layer in layers.items() for name in layer.TENSORS}
        assert {name for name, _ in tree_flatten(loaded.model.trainable_parameters())} == names

        def loss() -> mx.array:
            return nn.losses.cross_entropy(loaded.model(IDS)[:, :-1], IDS[:, 1:]).sum()

        _, grads = nn.value_and_grad(loaded.model, loss)()
        empty = [name for name, grad in tree_flatten(grads) if not mx.abs(grad).max().item() > 0]
        assert empty == []

    def test_merged_is_unmerged(self, arch: str, case: str, folders: dict[str, Path]) -> None:
        loaded, _ = attached(folders[arch], METHODS[case], trained=True)
        expected = logits(loaded)
        merged = [(path, layer.merge()) for path, layer in adapter.layers(loaded.model).items()]
        loaded.model.update_modules(tree_unflatten(merged))
        assert not adapter.layers(loaded.model)
        np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected))

    def test_with_a_cache_is_without(self, arch: str, case: str, folders: dict[str, Path]) -> None:
        loaded, _ = attached(folders[arch], METHODS[case], trained=True)
        expected, cache = logits(loaded), make_prompt_cache(loaded.model)
        pieces = [np.array(loaded.model(IDS[:, i : i + 2], cache=cache)) for i in range(0, 8, 2)]
        np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=bound(expected))

    def test_saved_and_loaded_is_bit_equal(
        self, arch: str, case: str, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        loaded, meta = attached(folders[arch], METHODS[case], trained=True)
        adapter.save(tmp_path, loaded.model, meta=meta)
        again = model.load(folders[arch])
        read = adapter.load(again, tmp_path)
        again.model.eval()
        assert np.array_equal(logits(again), logits(loaded))
        assert (read.method, read.config, read.template) == (meta.method, meta.config, "plain")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", METHODS)
def test_pytorch_computes_the_same(arch: str, case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    loaded, meta = attached(folders[arch], METHODS[case], trained=True)
    adapter.save(tmp_path / "a", loaded.model, meta=meta)
    peft.export(tmp_path / "a", tmp_path / "p", base="owner/base")
    verdict = peft.verify(tmp_path / "p", folders[arch])
    assert verdict.missing == verdict.unexpected == ()
    assert verdict.peft_diff <= verdict.bound
    assert verdict.auto_diff <= verdict.bound
    assert verdict.greedy_equal
    assert verdict.effect > 1e-2, "the negative control: without the adapter it must not pass"


def test_verify_fails_for_another_scale(folders: dict[str, Path], tmp_path: Path) -> None:
    """The check can fail: PyTorch is given another lora_alpha than MLX."""
    loaded, meta = attached(folders["llama"], METHODS["lora"], trained=True)
    adapter.save(tmp_path / "a", loaded.model, meta=meta)
    peft.export(tmp_path / "a", tmp_path / "p", base="owner/base")
    other = json.loads((tmp_path / "p" / "adapter_config.json").read_text()) | {"lora_alpha": 1}
    expected = peft.verify(tmp_path / "p", folders["llama"])
    scaled = tmp_path / "scaled"
    peft.export(tmp_path / "a", scaled, base="owner/base")
    real = peft._with_base

    def with_other_alpha(folder: Path, copy: Path, base: Path) -> Path:
        real(folder, copy, base)
        (copy / "adapter_config.json").write_text(json.dumps(other | {"base_model_name_or_path": str(base)}))
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft, "_with_base", with_other_alpha)
        verdict = peft.verify(scaled, folders["llama"])
    assert expected.passed
    assert not verdict.passed
    assert verdict.peft_diff > 1e-2


def test_an_adapter_written_by_peft_loads_here(folders: dict[str, Path], tmp_path: Path) -> None:
    """Trained and saved by PEFT itself, on the same weights: equal logits, and back again bit for bit."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from mlx_adapters.convert.to_transformers import write_transformers

    loaded = model.load(folders["qwen3"])
    base = write_transformers(loaded.model, loaded.config, tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
        expected = theirs(torch.tensor(IDS.tolist())).logits.numpy()
    theirs.save_pretrained(tmp_path / "peft")
    meta = adapter.load(loaded, tmp_path / "peft")
    loaded.model.eval()
    np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected))
    adapter.save(tmp_path / "again", loaded.model, meta=meta)
    before, after = (
        mx.load(str(folder / "adapter_model.safetensors"))
        for folder in (tmp_path / "peft", tmp_path / "again")
    )
    assert set(before) == set(after)
    assert all(mx.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_works(bits: int, folders: dict[str, Path], tmp_path: Path) -> None:
    convert(str(folders["llama"]), tmp_path / "q", bits=bits, group_size=32)
    loaded, meta = attached(tmp_path / "q", METHODS["lora"], trained=True)
    adapter.save(tmp_path / "a", loaded.model, meta=meta)
    peft.export(tmp_path / "a", tmp_path / "p", base="owner/base")
    assert peft.verify(tmp_path / "p", tmp_path / "q").passed


def bound(expected: np.ndarray) -> float:
    return float(1e-5 + 1e-5 * np.abs(expected).max())


# Targets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "layers", "expected"),
    [
        ("default", "all", 4),
        ("attn", "all", 8),
        ("mlp", "all", 6),
        ("attn+mlp", "0", 7),
        ("all-linear", "last:1", 7),
        ("q_proj,down_proj", "0-1", 4),
        ("self_attn.o_proj", "all", 2),
        (r"re:.*layers\.1\..*_proj", "all", 7),
    ],
)
def test_targets(targets: str, layers: str, expected: int, folders: dict[str, Path]) -> None:
    network = model.load(folders["llama"]).model
    assert len(resolve_targets(network, "llama", targets=targets, layers=layers)) == expected


@pytest.mark.parametrize(
    ("targets", "layers", "said"),
    [
        ("q_porj", "all", "q_porj"),
        ("q_proj,nothing", "all", "'nothing'"),
        ("re:(", "all", "regular expression"),
        ("re:nothing", "all", "match no linear layer"),
        ("default", "5", "0-1"),
        ("default", "last:x", "last:N"),
    ],
)
def test_targets_that_match_nothing_are_errors(
    targets: str, layers: str, said: str, folders: dict[str, Path]
) -> None:
    network = model.load(folders["llama"]).model
    with pytest.raises(ConfigError, match=said):
        resolve_targets(network, "llama", targets=targets, layers=layers)


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_dora", True), ("bias", "all"), ("rank_pattern", {"q_proj": 2}), ("modules_to_save", ["lm_head"])],
)
def test_a_peft_field_that_changes_the_function_is_refused_by_name(
    field: str, value: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    loaded, meta = attached(folders["llama"], METHODS["lora"], trained=True)
    adapter.save(tmp_path, loaded.model, meta=meta)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(AdapterError, match=field):
        adapter.load(model.load(folders["llama"]), tmp_path)
