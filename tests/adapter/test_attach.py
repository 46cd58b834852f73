"""An adapter on the bare model of mlx-lm: put on, trained by one's own loop, saved, taken off."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cases import METHODS
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load as mlx_lm_load

from mlx_adapters import adapter, methods
from mlx_adapters.adapter import multi
from mlx_adapters.errors import AdapterError, UnsupportedError
from mlx_adapters.methods import LoRA, Prefix
from mlx_adapters.models import load as model

IDS = mx.array([[4, 5, 6, 7, 8, 9, 10, 11], [11, 10, 9, 8, 7, 6, 5, 4]])


def identities(network: nn.Module) -> dict[str, int]:
    return {path: id(module) for path, module in network.named_modules()}


def own_loop(network: nn.Module, steps: int = 8) -> list[float]:
    """What a user of mlx-lm writes: nothing of this library stands in it."""
    import mlx.optimizers as optim

    def loss(network: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(network(IDS[:, :-1]), IDS[:, 1:], reduction="mean")

    optimizer, losses = optim.Adam(learning_rate=2e-2), []
    step = nn.value_and_grad(network, loss)
    for _ in range(steps):
        value, gradients = step(network)
        optimizer.update(network, gradients)
        mx.eval(network.parameters(), optimizer.state)
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("case", METHODS)
def test_detached_the_model_has_its_own_modules_again(case: str, folders: dict[str, Path]) -> None:
    loaded = model.load(folders["llama"])
    network, before = loaded.model, identities(loaded.model)
    expected = network(IDS)
    method = methods.make(METHODS[case].name, METHODS[case].settings(folders["llama"]))
    placed = adapter.attach(network, method)
    assert placed.keys() == adapter.layers(network).keys() != set()
    assert identities(network) != before
    adapter.detach(network)
    assert identities(network) == before
    assert not tree_flatten(network.trainable_parameters())
    assert mx.array_equal(network(IDS), expected)
    adapter.attach(loaded, LoRA(rank=2))  # and it takes another one


def test_a_model_with_an_adapter_is_freed_at_once(folders: dict[str, Path]) -> None:
    loaded = model.load(folders["llama"])
    adapter.attach(loaded, Prefix(num_virtual_tokens=2))
    gone = weakref.ref(loaded.model)
    gc.disable()
    try:
        del loaded
        assert gone() is None
    finally:
        gc.enable()


def test_what_merged_layers_replaced_is_freed(folders: dict[str, Path]) -> None:
    network = model.load(folders["llama"]).model
    adapter.attach(network, LoRA(rank=2))
    merged = [(path, layer.merge()) for path, layer in adapter.layers(network).items()]
    gone = [weakref.ref(layer.base) for layer in adapter.layers(network).values()]
    network.update_modules(tree_unflatten(merged))
    adapter.forget(network)
    assert not any(reference() for reference in gone)
    adapter.attach(network, LoRA(rank=2))


def test_a_loaded_adapter_comes_off_too(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = model.load(folders["llama"])
    before = identities(loaded.model)
    adapter.attach(loaded, Prefix(num_virtual_tokens=2))
    adapter.save(loaded, tmp_path)
    adapter.detach(loaded)
    adapter.load(loaded, str(tmp_path))
    adapter.detach(loaded)
    assert identities(loaded.model) == before
    assert "prefix" not in loaded.model


def test_there_must_be_something_to_detach_or_to_save(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = model.load(folders["llama"])
    with pytest.raises(AdapterError, match="nothing to detach"):
        adapter.detach(loaded)
    with pytest.raises(AdapterError, match="attach one first"):
        adapter.save(loaded, tmp_path / "a")
    adapter.attach(loaded, LoRA(rank=2))
    adapter.save(loaded, tmp_path / "a")
    adapter.detach(loaded)
    multi.load_adapters(loaded, {"a": tmp_path / "a"})
    with pytest.raises(AdapterError, match="by name"):
        adapter.detach(loaded)
    with pytest.raises(UnsupportedError, match="give model_type"):
        adapter.attach(nn.Sequential(nn.Linear(2, 2)), LoRA())


def test_a_model_of_mlx_lm_is_trained_by_its_own_loop_and_peft_opens_the_folder(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network, *_ = mlx_lm_load(str(folders["llama"]))
    adapter.attach(network, LoRA(rank=4, targets="attn"))
    losses = own_loop(network)
    assert losses[-1] < losses[0]
    adapter.save(network, str(tmp_path / "out"), base="owner/base")
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (fields["base_model_name_or_path"], fields["r"]) == ("owner/base", 4)
    network.eval()
    ours = np.array(network(IDS))
    base = AutoModelForCausalLM.from_pretrained(folders["llama"] / "torch", dtype=torch.float32)
    plain = base(torch.tensor(IDS.tolist())).logits.detach().numpy()
    opened = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        theirs = opened(torch.tensor(IDS.tolist())).logits.numpy()
    assert np.abs(ours - theirs).max() <= 1e-5 + 1e-5 * np.abs(theirs).max()
    assert np.abs(plain - theirs).max() > 1e-3, "the adapter changes something"
    again = model.load(folders["llama"])
    assert adapter.load(again, tmp_path / "out").method == LoRA(rank=4, targets="attn")
    again.model.eval()
    # load() has other linear layers on a CPU than mlx-lm's own loader
    assert np.abs(np.array(again.model(IDS)) - ours).max() <= 1e-5 + 1e-5 * np.abs(ours).max()


def test_what_was_loaded_is_saved_with_all_that_was_known(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = model.load(folders["llama"])
    adapter.attach(loaded, LoRA(rank=2))
    about: dict[str, Any] = {
        "template": "alpaca",
        "loss_on": "all",
        "seen": ["00aa"],
        "training": {"lr": 1.0},
    }
    meta = adapter.AdapterMeta(method=LoRA(rank=2), base=model.describe(loaded), **about)
    adapter.save(loaded, tmp_path / "a", meta=meta)
    again = model.load(folders["llama"])
    adapter.load(again, tmp_path / "a")
    adapter.save(again, tmp_path / "b")
    assert adapter.read_meta(tmp_path / "b") == adapter.read_meta(tmp_path / "a") == meta
    one, other = (dict(tree_flatten(adapter.read_tensors(tmp_path / name))) for name in "ab")
    assert all(mx.array_equal(one[name], other[name]) for name in one)
