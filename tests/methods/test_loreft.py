"""LoReFT against torch's QR decomposition: the same edit, the same training; and where it does not fit."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
import samples
import torch
from adapted import IDS, attached, bound, logits
from cases import METHODS
from mlx import nn
from mlx.utils import tree_flatten
from transformers import AutoModelForCausalLM
from trials import trial

from mlx_adapters import adapter, methods
from mlx_adapters.adapter.call import call_model
from mlx_adapters.convert import exchange
from mlx_adapters.errors import AdaptersError, ConfigError, UnsupportedError
from mlx_adapters.methods.loreft import orthonormal
from mlx_adapters.models import load as model
from mlx_adapters.train.recompute import Recompute

STEPS, ROWS, LENGTH, RATE = 20, 4, 12, 1e-2


def torch_orthonormal(m: torch.Tensor) -> torch.Tensor:
    q, r = torch.linalg.qr(m.T)
    return (q * r.diagonal().sign()).T


@pytest.mark.parametrize(("rank", "width"), [(1, 5), (4, 32), (8, 576), (16, 16)])
def test_rows_are_orthonormal_and_torchs(rank: int, width: int) -> None:
    given = np.random.default_rng(rank).normal(size=(rank, width)).astype(np.float32)
    ours = np.array(orthonormal(mx.array(given)))
    np.testing.assert_allclose(ours @ ours.T, np.eye(rank), atol=1e-5)
    np.testing.assert_allclose(ours, torch_orthonormal(torch.tensor(given)).numpy(), atol=2e-5)


def in_torch(folder: Path, tensors: dict[str, mx.array]) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """The base with the formula of the paper behind each block, its tensors as parameters."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    network.eval().requires_grad_(False)
    named = {name: torch.nn.Parameter(torch.tensor(np.array(t))) for name, t in tensors.items()}
    modules = dict(network.named_modules())
    for path in {name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in named}:
        own = {name.split(f"{path}.")[1]: t for name, t in named.items() if f".{path}." in name}

        def after(module: Any, given: Any, out: Any, own: Any = own) -> Any:
            h = out[0] if isinstance(out, tuple) else out
            r = torch_orthonormal(own["rotate_layer.weight"])
            learned = h @ own["learned_source.weight"].T + own["learned_source.bias"]
            y = h + (learned - h @ r.T) @ r
            return (y, *out[1:]) if isinstance(out, tuple) else y

        modules[path].register_forward_hook(after)
    return network, named


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_twenty_steps_equal_torch(arch: str, folders: dict[str, Path]) -> None:
    """From the same start, on the same batches, with AdamW: the same losses and the same adapter."""
    loaded, _ = attached(folders[arch], METHODS["loreft"], trained=False)
    model_type = loaded.config["model_type"]
    network, named = in_torch(folders[arch] / "torch", adapter.tensors(loaded.model, model_type))
    theirs_adam = torch.optim.AdamW(named.values(), lr=RATE, weight_decay=0.0)
    ours_adam = mlx.optimizers.AdamW(RATE, weight_decay=0.0, bias_correction=True)

    def loss(ids: mx.array) -> mx.array:
        return nn.losses.cross_entropy(loaded.model(ids)[:, :-1], ids[:, 1:]).mean()

    ours, theirs = [], []
    for batch in np.random.default_rng(0).integers(3, 64, size=(STEPS, ROWS, LENGTH)):
        value, grads = nn.value_and_grad(loaded.model, loss)(mx.array(batch))
        ours_adam.update(loaded.model, grads)
        mx.eval(loaded.model.parameters(), ours_adam.state)
        ours.append(float(value))
        out = network(torch.tensor(batch)).logits[:, :-1]
        value = torch.nn.functional.cross_entropy(out.flatten(0, 1), torch.tensor(batch)[:, 1:].flatten())
        theirs_adam.zero_grad()
        value.backward()
        theirs_adam.step()
        theirs.append(value.item())
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert max(abs(ours[0] - value) for value in ours) > 1e-2
    after = adapter.tensors(loaded.model, model_type)
    for name, tensor in named.items():
        np.testing.assert_allclose(np.array(after[name]), tensor.detach().numpy(), atol=1e-3)


def test_recomputed_blocks_have_the_same_gradient(folders: dict[str, Path]) -> None:
    gradients = []
    for recompute in (False, True):
        loaded, _ = attached(folders["llama"], METHODS["loreft"], trained=True)
        wrap = Recompute(loaded.model) if recompute else lambda function: function
        loaded.model.train()

        def loss(network: nn.Module = loaded.model) -> mx.array:
            return nn.losses.cross_entropy(network(IDS)[:, :-1], IDS[:, 1:]).sum()

        gradients.append(dict(mlx.utils.tree_flatten(wrap(nn.value_and_grad(loaded.model, loss))()[1])))
    for name, gradient in gradients[0].items():
        assert mx.abs(gradient).max().item() > 0
        np.testing.assert_allclose(np.array(gradient), np.array(gradients[1][name]), atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "mamba", "gemma3_text", "falcon_h1"])
def test_other_architectures_work_or_say_why(model_type: str) -> None:
    """Stacked experts, latent attention, states and windows: the block is all that matters."""
    said = trial(model_type, "loreft")
    assert said is None or said.startswith("loreft: "), said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 1000}, "rank=1000 is above"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"layers": "7"}, "0-1"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], said: str, folders: dict[str, Path]) -> None:
    loaded = model.load(folders["llama"])

    def attach() -> None:
        config = methods.make("loreft", fields)
        adapter.attach(loaded, config)

    with pytest.raises(ConfigError, match=said):
        attach()


@pytest.mark.parametrize("form", ["adapterhub", "llm-adapters", "mlx-lm"])
def test_other_formats_refuse_it_by_name(form: str, folders: dict[str, Path], tmp_path: Path) -> None:
    loaded, meta = attached(folders["llama"], METHODS["loreft"], trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    with pytest.raises(AdaptersError, match="loreft"):
        exchange.export(tmp_path / "a", tmp_path / "b", format=form, base="owner/base")
    assert not (tmp_path / "b").exists()


def test_a_block_that_returns_more_keeps_the_rest() -> None:
    class Block(nn.Module):
        def __call__(self, x: mx.array, rest: Any) -> Any:
            return x, rest

    from mlx_adapters.methods.loreft import Layer

    layer, x = Layer(Block(), width=4, rank=2, dropout=0.0), mx.ones((1, 4))
    for rest in (None, (mx.ones((1, 2)), 3), mx.zeros((1, 4))):
        h, kept = layer(x, rest)
        assert mx.array_equal(h, layer._edited(x)).item()
        assert kept is rest
        assert mx.abs(h - x).max().item() > 0
    for rest in (object(), [object()]):  # a part of the residual stream may be in there
        with pytest.raises(UnsupportedError, match="in parts"):
            layer(x, rest)
    with pytest.raises(UnsupportedError, match="in parts"):
        Layer(Block(), width=6, rank=2, dropout=0.0)(x, None)


@pytest.mark.parametrize("name", ["gemma4_text", "rwkv7"])
def test_it_trains_where_blocks_return_more(name: str) -> None:

    model = samples.sample(name)
    adapter.attach(model, methods.make("loreft", {"rank": 3}), model_type=name)
    ids = samples.IDS

    def loss() -> mx.array:
        return nn.losses.cross_entropy(call_model(model, ids[:, :-1]), ids[:, 1:]).mean()

    gradients = dict(tree_flatten(nn.value_and_grad(model, loss)()[1]))
    assert len(gradients) == 3 * len(model.layers)
    assert all(mx.abs(gradient).max().item() > 0 for gradient in gradients.values())


def test_several_share_a_base(folders: dict[str, Path], tmp_path: Path) -> None:
    """Switched on and off beside a LoRA: alone each gives what it gives on a fresh base."""
    from mlx_adapters.adapter import multi

    expected = {}
    for name in ("lora", "loreft"):
        loaded, meta = attached(folders["llama"], METHODS[name], trained=True)
        adapter.save(loaded.model, tmp_path / name, meta=meta)
        expected[name] = logits(loaded)
    loaded = model.load(folders["llama"])
    loaded.model.eval()
    base = logits(loaded)
    multi.load_adapters(loaded, {name: tmp_path / name for name in expected})
    for name, alone in expected.items():
        multi.activate(loaded.model, name)
        np.testing.assert_allclose(logits(loaded), alone, atol=bound(alone))
    multi.activate(loaded.model, ["lora", "loreft"])
    both = logits(loaded)
    assert min(np.abs(both - alone).max() for alone in expected.values()) > 1e-2
    multi.activate(loaded.model, None)
    assert np.array_equal(logits(loaded), base)
    with (
        pytest.raises(UnsupportedError, match="loreft"),
        multi.rows(loaded.model, ["loreft", "lora"]),
    ):
        logits(loaded)
