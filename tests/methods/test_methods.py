"""Every method on every architecture: what it trains, what it computes, and what PyTorch makes of it."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapted import IDS, attached, bound, logits
from cases import ARCHITECTURES, METHODS, pairs, refusals, sampled
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_adapters import adapter, methods
from mlx_adapters.adapter.call import call_model, start_cache, virtual_ids
from mlx_adapters.convert import peft
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.errors import AdapterError, AdaptersError, ConfigError
from mlx_adapters.methods.base import linear_like, plain_weight, resolve_targets
from mlx_adapters.models import load as model


def test_every_method_has_a_row() -> None:
    assert {case.name for case in METHODS.values()} == set(methods.names())


@pytest.mark.parametrize(("case", "arch"), refusals())
def test_what_does_not_fit_is_refused_with_a_reason(case: str, arch: str, folders: dict[str, Path]) -> None:
    with pytest.raises(AdaptersError, match=METHODS[case].refused[arch]):
        attached(folders[arch], METHODS[case], trained=False)


@pytest.mark.parametrize(("case", "arch"), sampled(pairs()))
class TestMethod:
    def test_a_fresh_adapter_is_the_base(self, case: str, arch: str, folders: dict[str, Path]) -> None:
        method = METHODS[case]
        base = logits(model.load(folders[arch]))
        fresh = logits(attached(folders[arch], method, trained=False)[0])
        changed = logits(attached(folders[arch], method, trained=True)[0])
        assert (np.abs(base - fresh).max() <= bound(base)) == method.identity
        assert np.abs(changed - base).max() > 1e-2

    def test_only_the_adapter_trains_and_all_of_it(
        self, case: str, arch: str, folders: dict[str, Path]
    ) -> None:
        loaded, _ = attached(folders[arch], METHODS[case], trained=True)
        layers = adapter.layers(loaded.model)
        names = [name for name, _ in tree_flatten(loaded.model.trainable_parameters())]
        assert all(any(name.startswith(f"{path}.") for path in layers) for name in names)
        assert all(any(name.startswith(f"{path}.") for name in names) for path in layers)
        assert not any(".base." in name for name in names)

        def loss() -> mx.array:
            return nn.losses.cross_entropy(call_model(loaded.model, IDS)[:, :-1], IDS[:, 1:]).sum()

        _, grads = nn.value_and_grad(loaded.model, loss)()
        empty = [name for name, grad in tree_flatten(grads) if not mx.abs(grad).max().item() > 0]
        assert empty == []

    def test_with_a_cache_is_without(self, case: str, arch: str, folders: dict[str, Path]) -> None:
        loaded, _ = attached(folders[arch], METHODS[case], trained=True)
        expected = logits(loaded)
        cache = start_cache(loaded.model, 2) or make_prompt_cache(loaded.model)
        front = mx.array([virtual_ids(loaded.model)] * 2, mx.int32)
        ids = mx.concatenate([front, IDS.astype(mx.int32)], axis=1)
        steps = [ids[:, i : i + 2] for i in range(0, ids.shape[1], 2)]
        pieces = [np.array(loaded.model(step, cache=cache)) for step in steps]
        cached = np.concatenate(pieces, axis=1)[:, front.shape[1] :]
        np.testing.assert_allclose(cached, expected, atol=bound(expected))

    def test_saved_and_loaded_is_bit_equal(
        self, case: str, arch: str, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        loaded, meta = attached(folders[arch], METHODS[case], trained=True)
        adapter.save(loaded.model, tmp_path, meta=meta)
        again = model.load(folders[arch])
        read = adapter.load(again, tmp_path)
        again.model.eval()
        assert np.array_equal(logits(again), logits(loaded))
        assert (read.method, read.template) == (meta.method.as_saved(), "plain")


@pytest.mark.parametrize(("case", "arch"), sampled(pairs(mergeable=True)))
def test_merged_is_unmerged(case: str, arch: str, folders: dict[str, Path]) -> None:
    loaded, _ = attached(folders[arch], METHODS[case], trained=True)
    expected = logits(loaded)
    merged = [(path, layer.merge()) for path, layer in adapter.layers(loaded.model).items()]
    loaded.model.update_modules(tree_unflatten(merged))
    assert not adapter.layers(loaded.model)
    np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected))


@pytest.mark.parametrize("case", [case for case, method in METHODS.items() if not method.mergeable])
def test_what_cannot_be_merged_says_so(case: str, folders: dict[str, Path]) -> None:
    arch = next(arch for arch in ARCHITECTURES if arch not in METHODS[case].refused)
    loaded, _ = attached(folders[arch], METHODS[case], trained=True)
    with pytest.raises(ConfigError, match="cannot be merged"):
        next(iter(adapter.layers(loaded.model).values())).merge()


@pytest.mark.parametrize(("case", "arch"), sampled(pairs(peft=True)))
def test_pytorch_computes_the_same(case: str, arch: str, folders: dict[str, Path], tmp_path: Path) -> None:
    loaded, meta = attached(folders[arch], METHODS[case], trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    peft.export(tmp_path / "a", tmp_path / "p", base="owner/base")
    verdict = peft.verify(tmp_path / "p", folders[arch])
    assert verdict.missing == verdict.unexpected == ()
    assert verdict.peft_diff <= verdict.bound
    assert verdict.auto_diff is None or verdict.auto_diff <= verdict.bound
    assert verdict.greedy_equal
    assert verdict.effect > 1e-2, "the negative control: without the adapter it must not pass"


def test_verify_fails_for_another_scale(folders: dict[str, Path], tmp_path: Path) -> None:
    """The check can fail: PyTorch is given another lora_alpha than MLX."""
    loaded, meta = attached(folders["llama"], METHODS["lora"], trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
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
    adapter.save(loaded.model, tmp_path / "again", meta=meta)
    before, after = (
        mx.load(str(folder / "adapter_model.safetensors"))
        for folder in (tmp_path / "peft", tmp_path / "again")
    )
    assert set(before) == set(after)
    assert all(mx.array_equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def quantized(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The tiny llama in 4 and 8 bits."""
    root = tmp_path_factory.mktemp("quantized")
    for bits in (4, 8):
        convert(str(folders["llama"]), root / str(bits), bits=bits, group_size=32)
    return {bits: root / str(bits) for bits in (4, 8)}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", [case for case, method in METHODS.items() if "llama" not in method.refused])
def test_a_quantized_base_works(case: str, bits: int, quantized: dict[int, Path], tmp_path: Path) -> None:
    """The same adapter on the quantized base and on that base written out: equal up to rounding."""
    loaded, meta = attached(quantized[bits], METHODS[case], trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    dense = model.load(quantized[bits])
    dense.model.update_modules(tree_unflatten([(p, _dense(m)) for p, m in _quantized(dense.model)]))
    adapter.load(dense, tmp_path / "a")
    dense.model.eval()
    expected = logits(dense)
    np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected))
    if case == "lora":
        peft.export(tmp_path / "a", tmp_path / "p", base="owner/base")
        assert peft.verify(tmp_path / "p", quantized[bits]).passed


def _quantized(network: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(p, m) for p, m in network.named_modules() if isinstance(m, nn.QuantizedLinear)]


def _dense(layer: nn.Module) -> nn.Linear:
    return linear_like(layer, plain_weight(layer))


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
    [("use_dora", True), ("bias", "all"), ("layer_replication", [[0, 2]]), ("target_parameters", ["x"])],
)
def test_a_peft_field_that_changes_the_function_is_refused_by_name(
    field: str, value: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    loaded, meta = attached(folders["llama"], METHODS["lora"], trained=True)
    adapter.save(loaded.model, tmp_path, meta=meta)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(AdapterError, match=field):
        adapter.load(model.load(folders["llama"]), tmp_path)
