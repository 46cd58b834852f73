"""LoRA on the stacked experts of a mixture: algebra, training, saving, mlx-lm, and a fused checkpoint."""

from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from adapted import IDS, attached, bound, logits
from cases import Method, few
from in_transformers import in_torch
from mlx.utils import tree_flatten, tree_unflatten
from peft import LoraConfig, get_peft_model
from tiny import make_tiny
from torch_training import CONFIG, examples, train_in_torch
from transformers import AutoModelForCausalLM

from mlx_adapters import adapter
from mlx_adapters.adapter import multi
from mlx_adapters.convert import exchange, peft
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.fuse import fuse
from mlx_adapters.convert.to_transformers import write_transformers
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import AdapterError, AdaptersError, ConfigError, UnsupportedError
from mlx_adapters.models import load as model
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run

METHOD = Method("lora", {"rank": 3, "alpha": 5.0, "targets": "attn+experts"})


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    convert(make_tiny(request.param, root), root / "mlx")
    return root / "mlx"


def test_fresh_is_the_base_and_merged_is_unmerged(folder: Path) -> None:
    fresh, _ = attached(folder, METHOD, trained=False)
    assert len(adapter.layers(fresh.model)) == 2 * (4 + 1), "q, k, v, o and the experts"
    assert np.array_equal(logits(fresh), logits(model.load(folder)))
    loaded, _ = attached(folder, METHOD, trained=True)
    expected = logits(loaded)
    assert np.abs(expected - logits(fresh)).max() > 1e-2
    merged = [(path, layer.merge()) for path, layer in adapter.layers(loaded.model).items()]
    loaded.model.update_modules(tree_unflatten(merged))
    np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected))


def test_it_trains_every_array(folder: Path) -> None:
    loaded, _ = attached(folder, METHOD, trained=False)
    before = dict(tree_flatten(loaded.model.trainable_parameters()))
    config = TrainConfig(steps=15, batch_size=2, lr=1e-2, warmup=0)
    steps = list(Run(loaded.model, [Example(row, 1) for row in IDS.tolist()], config=config))
    assert steps[-1].loss < 0.9 * steps[0].loss
    after = dict(tree_flatten(loaded.model.trainable_parameters()))
    assert all(not mx.array_equal(array, after[path]) for path, array in before.items())


def test_saved_and_loaded_and_through_mlx_lm(folder: Path, tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters

    loaded, meta = attached(folder, METHOD, trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    expected = logits(loaded)
    again = model.load(folder)
    adapter.load(again, tmp_path / "a")
    again.model.eval()
    assert np.array_equal(logits(again), expected)
    exchange.export(tmp_path / "a", tmp_path / "theirs", format="mlx-lm")
    network = load_adapters(model.load(folder).model, str(tmp_path / "theirs"))
    network.eval()
    np.testing.assert_allclose(np.array(network(IDS)), expected, atol=bound(expected))
    exchange.import_adapter(tmp_path / "theirs", tmp_path / "b", loaded=model.load(folder))
    third = model.load(folder)
    adapter.load(third, tmp_path / "b")
    third.model.eval()
    assert len(adapter.layers(third.model)) == 2 * (4 + 1), "gate's and up's factors are blocks of one pair"
    np.testing.assert_allclose(logits(third), expected, atol=bound(expected))
    exchange.export(tmp_path / "b", tmp_path / "p", format="peft", base="owner/base")
    assert peft.verify(tmp_path / "p", folder).passed
    exchange.export(tmp_path / "b", tmp_path / "back", format="mlx-lm")
    network = load_adapters(model.load(folder).model, str(tmp_path / "back"))
    network.eval()
    np.testing.assert_allclose(np.array(network(IDS)), expected, atol=bound(expected))
    merged = [(path, layer.merge()) for path, layer in adapter.layers(third.model).items()]
    third.model.update_modules(tree_unflatten(merged))
    np.testing.assert_allclose(logits(third), expected, atol=bound(expected))


def test_fused_for_transformers(folder: Path, tmp_path: Path) -> None:
    loaded, meta = attached(folder, METHOD, trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    expected = logits(loaded)
    fuse(folder, tmp_path / "a", tmp_path / "fused")
    np.testing.assert_allclose(in_torch(tmp_path / "fused"), expected, atol=bound(expected))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_experts(bits: int, folder: Path, tmp_path: Path) -> None:
    source = folder.parent / ("mixtral" if (folder.parent / "mixtral").exists() else "qwen3_moe")
    small = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    convert(make_tiny(source.name, tmp_path, **small), tmp_path / "q", bits=bits, group_size=32)
    loaded, meta = attached(tmp_path / "q", METHOD, trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    expected = logits(loaded)
    done = fuse(tmp_path / "q", tmp_path / "a", tmp_path / "dense", to="mlx")
    assert done.error <= bound(expected)


MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "dots1", "glm4_moe", "deepseek_v2")


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixtures")
    for arch in MIXTURES:
        # mlx-lm does not read norm_topk_prob of qwen2_moe, whose models have it off
        more = {"norm_topk_prob": False} if arch == "qwen2_moe" else {}
        convert(make_tiny(arch, root, **more), root / f"mlx-{arch}")
    return {arch: root / f"mlx-{arch}" for arch in MIXTURES}


FIELDS = [
    {"targets": "experts,o_proj", "rank_pattern": "gate_up_proj=2", "alpha_pattern": "down_proj=4"},
    # the router, dense layers and shared experts, which PEFT would take for the experts by their names
    {"targets": "all-linear", "dropout": 0.1},
    {"targets": "all-linear,experts", "rslora": True},
]


@pytest.mark.parametrize(("arch", "fields"), few(product(MIXTURES, FIELDS), every=2))
def test_pytorch_computes_the_same(
    arch: str, fields: dict[str, Any], mixtures: dict[str, Path], tmp_path: Path
) -> None:
    """Through PeftModel and through transformers alone."""
    method = Method("lora", {"rank": 3, "alpha": 5.0, **fields})
    loaded, meta = attached(mixtures[arch], method, trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    peft.export(tmp_path / "a", tmp_path / "p", base="owner/base")
    verdict = peft.verify(tmp_path / "p", mixtures[arch])
    assert verdict.passed, verdict
    assert verdict.auto_diff is not None
    assert verdict.effect > 1e-2
    for ours in ("mlx_adapters.json", "seen.txt"):  # as if PEFT had written it
        (tmp_path / "p" / ours).unlink()
    again = model.load(mixtures[arch])
    adapter.load(again, tmp_path / "p")
    again.model.eval()
    assert np.array_equal(logits(again), logits(loaded))


def test_experts_alone_and_in_one_layer(folder: Path, tmp_path: Path) -> None:
    method = Method("lora", {"rank": 2, "targets": "experts", "layers": "last:1"})
    loaded, meta = attached(folder, method, trained=True)
    assert len(adapter.layers(loaded.model)) == 1
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    peft.export(tmp_path / "a", tmp_path / "p", base="owner/base")
    assert peft.verify(tmp_path / "p", folder).passed


def test_an_adapter_of_peft_trains_on_here(folder: Path, tmp_path: Path) -> None:
    """PEFT's folder gives the same logits, comes back bit for bit, and twenty steps agree in loss."""
    loaded = model.load(folder)
    base = write_transformers(loaded.model, loaded.config, tmp_path / "base")
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=stacks, task_type="CAUSAL_LM"
    )
    network = get_peft_model(opened(base), config)
    torch.manual_seed(0)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = network.eval()(torch.tensor(IDS.tolist())).logits.numpy()
    network.save_pretrained(tmp_path / "theirs")
    meta = adapter.load(loaded, tmp_path / "theirs")
    loaded.model.eval()
    np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected))
    adapter.save(loaded.model, tmp_path / "ours", meta=meta)
    before, after = (adapter.read_tensors(tmp_path / name) for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    again = Run(loaded.model, examples(), config=CONFIG)
    theirs = train_in_torch(network.train(), parameters, again)
    ours = [step.loss for step in Run(loaded.model, examples(), config=CONFIG)]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert len(ours) == 20


def test_rows_and_recomputed_blocks(folder: Path, tmp_path: Path) -> None:
    """A batch in which rows use different adapters; gradient checkpointing gives the same steps."""
    loaded, meta = attached(folder, METHOD, trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    expected, plain = logits(loaded), model.load(folder)
    base = logits(plain)
    multi.load_adapters(plain, {"a": tmp_path / "a"})
    plain.model.eval()
    with multi.rows(plain.model, ["a", None]):
        mixed = logits(plain)
    np.testing.assert_allclose(mixed[0], expected[0], atol=bound(expected))
    np.testing.assert_allclose(mixed[1], base[1], atol=bound(expected))
    losses = []
    for recompute in (False, True):
        fresh, _ = attached(folder, METHOD, trained=False)
        config = TrainConfig(steps=5, batch_size=2, lr=1e-2, warmup=0, gradient_checkpointing=recompute)
        examples = [Example(row, 1) for row in IDS.tolist()]
        losses.append([step.loss for step in Run(fresh.model, examples, config=config)])
    np.testing.assert_allclose(*losses, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"targets": "experts", "pissa": True}, "pissa needs linear layers"),
        ({"targets": "experts", "rank_pattern": "gate_proj=2"}, "matches no target"),
    ],
)
def test_refusals(fields: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(AdaptersError, match=said):
        attached(folder, Method("lora", fields), trained=False)


@pytest.mark.parametrize("method", ["dora", "ia3", "vera", "series", "parallel"])
def test_other_methods_say_who_adapts_experts(method: str, folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="only method lora adapts stacked experts"):
        attached(folder, Method(method, {"targets": "attn,experts"}), trained=False)


@pytest.mark.parametrize(
    ("arch", "method", "opens", "closed"),
    [
        ("glm4_moe", "dora", "attn", "mlp"),
        ("qwen2_moe", "dora", "mlp", "all-linear"),
        ("qwen2_moe", "ia3", "attn", "all-linear"),
        ("qwen3_moe", "vera", "attn", "all-linear"),
    ],
)
def test_what_peft_does_not_open_is_not_exported(
    arch: str, method: str, opens: str, closed: str, mixtures: dict[str, Path], tmp_path: Path
) -> None:
    for targets in (opens, closed):
        loaded, meta = attached(mixtures[arch], Method(method, {"targets": targets}), trained=True)
        adapter.save(loaded.model, tmp_path / targets, meta=meta)
    peft.export(tmp_path / opens, tmp_path / "p", base="owner/base")
    assert peft.verify(tmp_path / "p", mixtures[arch]).passed
    with pytest.raises(AdapterError, match=f"PEFT opens no {method} on"):
        peft.export(tmp_path / closed, tmp_path / "q", base="owner/base")


def test_models_without_experts_are_refused(tmp_path: Path) -> None:
    convert(make_tiny("llama", tmp_path), tmp_path / "llama-mlx")
    with pytest.raises(ConfigError, match="no stacked experts"):
        attached(tmp_path / "llama-mlx", METHOD, trained=False)
