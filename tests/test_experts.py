"""LoRA on the stacked experts of a mixture: algebra, training, saving, mlx-lm, and a fused checkpoint."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from cases import Method
from mlx.utils import tree_flatten, tree_unflatten
from test_fuse import in_torch
from test_methods import IDS, attached, bound, logits
from tiny import make_tiny

from mlx_adapters import adapter, model
from mlx_adapters.convert import exchange
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.fuse import fuse
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import AdapterError, ConfigError
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run

METHOD = Method("lora", {"rank": 3, "alpha": 5.0, "targets": "attn+experts"})


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    convert(make_tiny(request.param, root), root / "mlx")
    return root / "mlx"


def test_fresh_is_the_base_and_merged_is_unmerged(folder: Path) -> None:
    fresh, _ = attached(folder, METHOD, trained=False)
    assert len(adapter.layers(fresh.model)) == 2 * (4 + 3), "q, k, v, o and the three matrices of the experts"
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
    adapter.save(tmp_path / "a", loaded.model, meta=meta)
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
    one, other = (adapter.read_tensors(tmp_path / name) for name in ("a", "b"))
    assert one.keys() == other.keys()
    assert all(mx.array_equal(one[name], other[name]) for name in one)


def test_fused_for_transformers(folder: Path, tmp_path: Path) -> None:
    loaded, meta = attached(folder, METHOD, trained=True)
    adapter.save(tmp_path / "a", loaded.model, meta=meta)
    expected = logits(loaded)
    fuse(folder, tmp_path / "a", tmp_path / "fused")
    np.testing.assert_allclose(in_torch(tmp_path / "fused"), expected, atol=bound(expected))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_experts(bits: int, folder: Path, tmp_path: Path) -> None:
    source = folder.parent / ("mixtral" if (folder.parent / "mixtral").exists() else "qwen3_moe")
    small = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    convert(make_tiny(source.name, tmp_path, **small), tmp_path / "q", bits=bits, group_size=32)
    loaded, meta = attached(tmp_path / "q", METHOD, trained=True)
    adapter.save(tmp_path / "a", loaded.model, meta=meta)
    expected = logits(loaded)
    done = fuse(tmp_path / "q", tmp_path / "a", tmp_path / "dense", to="mlx")
    assert done.error <= bound(expected)


def test_peft_and_models_without_experts_are_refused(folder: Path, tmp_path: Path) -> None:
    loaded, meta = attached(folder, METHOD, trained=True)
    adapter.save(tmp_path / "a", loaded.model, meta=meta)
    with pytest.raises(AdapterError, match="stacked experts"):
        exchange.export(tmp_path / "a", tmp_path / "p", format="peft", base="owner/base")
    convert(make_tiny("llama", tmp_path), tmp_path / "llama-mlx")
    with pytest.raises(ConfigError, match="no stacked experts"):
        attached(tmp_path / "llama-mlx", METHOD, trained=False)
