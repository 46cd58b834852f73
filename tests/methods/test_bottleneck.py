"""Bottleneck adapters against an independent torch: logits on every architecture, training, and the parts."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
import torch
from adapted import IDS, attached, bound, logits
from cases import METHODS, pairs, sampled
from reference.bottleneck import attach
from tiny import random_llama

from mlx_adapters import adapter, methods
from mlx_adapters.errors import AdapterError, ConfigError, UnsupportedError
from mlx_adapters.methods import activations, bottleneck
from mlx_adapters.models import load as model

FAMILY = ("series", "parallel", "double_seq_bn", "seq_bn", "par_bn", "scaled_par_bn")
TORCH_IDS = torch.tensor(IDS.tolist())


def in_torch(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder / "torch", dtype=torch.float32, attn_implementation="eager"
    ).eval()


# The same function -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "arch"), sampled([pair for pair in pairs() if METHODS[pair[0]].name in FAMILY])
)
def test_torch_computes_the_same(case: str, arch: str, folders: dict[str, Path], tmp_path: Path) -> None:
    loaded, meta = attached(folders[arch], METHODS[case], trained=True)
    adapter.save(loaded.model, tmp_path, meta=meta)
    expected, network = logits(loaded), in_torch(folders[arch])
    with torch.no_grad():
        without = network(TORCH_IDS).logits.numpy()
        attach(network, tmp_path)
        theirs = network(TORCH_IDS).logits.numpy()
    assert np.abs(theirs - expected).max() <= bound(expected)
    assert np.abs(theirs - without).max() > 1e-2, "the negative control: the base alone must not pass"


@pytest.mark.parametrize("side", ["pre", "post"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom"])
def test_a_side_can_be_chosen(side: str, arch: str, folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = model.load(folders[arch])
    fields = {"bottleneck_size": 5, "side": side, "targets": "all-linear"}
    config, base = methods.make("series", fields), model.describe(loaded)
    adapter.attach(loaded, config)
    loaded.model.update(_random(loaded.model), strict=False)
    meta = adapter.AdapterMeta(method=config, base=base)
    adapter.save(loaded.model, tmp_path, meta=meta)
    network = in_torch(folders[arch])
    attach(network, tmp_path)
    with torch.no_grad():
        theirs = network(TORCH_IDS).logits.numpy()
    assert np.abs(theirs - logits(loaded)).max() <= bound(theirs)
    again = model.load(folders[arch])
    assert adapter.load(again, tmp_path).method == config
    assert np.array_equal(logits(again), logits(loaded))


# The same training -----------------------------------------------------------------------------------------

STEPS, ROWS, LENGTH, RATE = 20, 4, 12, 1e-2


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "case", ["series", "series-p-bert", "parallel", "parallel-learned", "seq_bn", "par_bn"]
)
def test_twenty_steps_equal_torch(case: str, arch: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """From the same weights, on the same batches, with AdamW: the same losses and the same adapter."""
    loaded, meta = attached(folders[arch], METHODS[case], trained=False)
    adapter.save(loaded.model, tmp_path, meta=meta)
    batches = np.random.default_rng(0).integers(3, 64, size=(STEPS, ROWS, LENGTH))
    theirs, named = _train_torch(in_torch(folders[arch]), tmp_path, batches)
    ours = _train_mlx(loaded.model, batches)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    # 12 random rows cannot be predicted from others: it is enough that training did something, and the same
    assert max(abs(ours[0] - loss) for loss in ours) > 1e-2
    after = adapter.tensors(loaded.model, loaded.config["model_type"])
    for name, tensor in named.items():
        np.testing.assert_allclose(np.array(after[name]), tensor.detach().numpy(), atol=1e-3)


def _train_mlx(network: nn.Module, batches: np.ndarray) -> list[float]:
    optimizer = mlx.optimizers.AdamW(RATE, weight_decay=0.0, bias_correction=True)

    def loss(ids: mx.array) -> mx.array:
        return nn.losses.cross_entropy(network(ids)[:, :-1], ids[:, 1:]).mean()

    losses = []
    for batch in batches:
        value, grads = nn.value_and_grad(network, loss)(mx.array(batch))
        optimizer.update(network, grads)
        mx.eval(network.parameters(), optimizer.state)
        losses.append(float(value))
    return losses


def _train_torch(network: Any, folder: Path, batches: np.ndarray) -> tuple[list[float], dict[str, Any]]:
    named = attach(network, folder)
    optimizer = torch.optim.AdamW(named.values(), lr=RATE, weight_decay=0.0)
    losses = []
    for batch in torch.tensor(batches):
        out = network(batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, named


# The parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(activations.ACTIVATIONS))
def test_activations_are_those_of_transformers(name: str) -> None:
    from transformers.activations import ACT2FN

    x = np.linspace(-12, 12, 481, dtype=np.float32)
    ours = np.array(activations.ACTIVATIONS[name](mx.array(x)))
    np.testing.assert_allclose(ours, ACT2FN[name](torch.tensor(x)).numpy(), atol=2e-6, rtol=2e-6)


def test_every_activation_without_parameters_is_offered() -> None:
    from transformers.activations import ACT2CLS

    have_parameters = {"prelu", "xielu"}
    assert set(ACT2CLS) - set(activations.ACTIVATIONS) <= have_parameters


@pytest.mark.parametrize("method", FAMILY)
def test_starts(method: str) -> None:
    """bert: both matrices normal(0, 0.02). mam_adapter: down uniform within 1 / sqrt(in), up zero."""
    for init in bottleneck.INITS:
        layers = adapter.layers(_wide_llama(method, init=init, bottleneck_size=32))
        for layer in layers.values():
            down, up = np.array(layer.down), np.array(layer.up)
            if init == "bert":
                assert abs(down.std() - 0.02) < 2e-3
                assert abs(up.std() - 0.02) < 2e-3
                assert abs(up.mean()) < 2e-3
            else:
                limit = 1 / np.sqrt(down.shape[1])
                assert 0.9 * limit < np.abs(down).max() <= limit
                assert not up.any()
            if "up_bias" in layer:
                assert not np.array(layer.down_bias).any()
                assert not np.array(layer.up_bias).any()


@pytest.mark.parametrize("method", FAMILY)
def test_dropout_acts_while_training_only(method: str) -> None:
    network = _wide_llama(method, dropout=0.5, init="bert", scaling=50)
    network.train()
    assert not np.array_equal(np.array(network(IDS)), np.array(network(IDS)))
    network.eval()
    assert np.array_equal(np.array(network(IDS)), np.array(network(IDS)))


@pytest.mark.parametrize(
    ("scaling", "kind"), [(4, float), ("4", float), ("0.5", float), ("learned", mx.array)]
)
@pytest.mark.parametrize("method", ["series", "parallel", "par_bn"])
def test_scaling_is_a_number_or_learned(method: str, scaling: Any, kind: type) -> None:
    """`scaling=4`, as `--set` gives it: an int stopped the seed's first forward."""
    network = _wide_llama(method, scaling=scaling)
    layer = next(iter(adapter.layers(network).values()))
    assert isinstance(layer.scaling, kind)
    assert ("scaling" in layer.trainable_parameters()) == (scaling == "learned")
    assert mx.isfinite(network(IDS)).all().item()


def test_variants_choose_the_papers_layers() -> None:
    def wrapped(**fields: Any) -> set[str]:
        return {path.rpartition(".")[2] for path in adapter.layers(_wide_llama("series", **fields))}

    assert wrapped() == wrapped(variant="H") == {"gate_proj", "up_proj", "down_proj"}
    assert wrapped(variant="P") == {"down_proj"}
    assert wrapped(targets="q_proj") == {"q_proj"}


def test_block_forms_stand_where_they_say() -> None:
    assert {path.rpartition(".")[2] for path in adapter.layers(_wide_llama("double_seq_bn"))} == {
        "o_proj",
        "down_proj",
    }
    for method in ("seq_bn", "par_bn", "scaled_par_bn"):
        last = _wide_llama(method, layers="last:1")
        assert list(adapter.layers(last)) == ["model.layers.1.mlp.down_proj"]
        assert mx.isfinite(last(IDS)).all().item()


@pytest.mark.parametrize(("factor", "size"), [(16, 4), (2, 32), (1, 64), (5, 12), (100, 1)])
def test_reduction_factor(factor: float, size: int) -> None:
    layers = adapter.layers(_wide_llama("seq_bn", reduction_factor=factor))
    assert {layer.down.shape for layer in layers.values()} == {(size, 64)}
    layers = adapter.layers(_wide_llama("seq_bn", reduction_factor=factor, bottleneck_size=7))
    assert {layer.down.shape for layer in layers.values()} == {(7, 64)}


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size=0 must be at least 1"),
        ({"bottleneck_size": -3}, "bottleneck_size=-3 must be at least 1"),
        ({"non_linearity": "rellu"}, "Did you mean 'relu'"),
        ({"dropout": 1.0}, "below 1"),
        ({"scaling": "learnt"}, "a finite number or 'learned'"),
        ({"scaling": float("nan")}, "finite number"),
        ({"scaling": float("inf")}, "finite number"),
        ({"init": "lora"}, "mam_adapter"),
    ],
)
def test_values_that_cannot_be_are_refused(method: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        methods.make(method, fields)
    assert method in str(caught.value)


@pytest.mark.parametrize("factor", [0, 0.5, -2, float("inf"), float("nan")])
def test_reduction_factors_that_cannot_be_are_refused(factor: float) -> None:
    for method in ("double_seq_bn", "seq_bn", "par_bn", "scaled_par_bn"):
        with pytest.raises(ConfigError, match="reduction_factor"):
            methods.make(method, {"reduction_factor": factor})


def test_no_norm_to_read_the_stream_from() -> None:
    """olmo2 has its norms behind the sublayers: said by name, with what to use."""
    network = _tiny_olmo2()
    for method in ("seq_bn", "par_bn", "scaled_par_bn"):
        config = methods.make(method, {})
        with pytest.raises(UnsupportedError, match="olmo2 model has no norm before its MLP"):
            adapter.attach(network, config)


def test_a_config_of_2023_finds_its_sides(folders: dict[str, Path], tmp_path: Path) -> None:
    """A folder without our own file: the sides follow from the names of the layers."""
    loaded, meta = attached(folders["llama"], METHODS["series"], trained=True)
    adapter.save(loaded.model, tmp_path, meta=meta)
    (tmp_path / adapter.META).unlink()
    fields = json.loads((tmp_path / adapter.CONFIG).read_text())
    assert fields["peft_type"] == "BOTTLENECK"
    again = model.load(folders["llama"])
    assert adapter.load(again, tmp_path).method.NAME == "series"
    sides = {path.rpartition(".")[2]: layer.kind for path, layer in adapter.layers(again.model).items()}
    assert sides == {"gate_proj": "pre", "up_proj": "pre", "down_proj": "post"}
    assert np.array_equal(logits(again), logits(loaded))


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bottleneck_size", "wide"),
        ("bottleneck_size", [6]),
        ("bottleneck_size", 0),
        ("scaling", None),
        ("scaling", "learnt"),
        ("non_linearity", 3),
        ("non_linearity", "rellu"),
    ],
)
def test_a_broken_adapter_config_names_its_field(
    method: str, name: str, value: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    loaded, meta = attached(folders["llama"], METHODS[method], trained=False)
    adapter.save(loaded.model, tmp_path, meta=meta)
    (tmp_path / adapter.META).unlink()
    file = tmp_path / adapter.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(AdapterError, match=name) as caught:
        adapter.load(model.load(folders["llama"]), tmp_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("method", ["seq_bn", "par_bn"])
def test_the_stream_is_let_go(method: str) -> None:
    """Between two forward passes no block keeps what it read: a large batch would cost gigabytes."""
    network = _wide_llama(method)
    slots = [module.slot for module in network.modules() if hasattr(module, "slot")]
    assert len(slots) == 2
    first = np.array(network(IDS))
    assert all(slot._value is None for slot in slots)
    assert np.array_equal(np.array(network(IDS)), first)


def test_two_adapters_of_a_block_read_one_stream() -> None:
    """Several layers of a block that lead out of its MLP: every adapter gets h, none is without."""

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = {"down_proj": nn.Linear(64, 64)}, {"down_proj": nn.Linear(64, 64)}

        def __call__(self, x: mx.array) -> mx.array:
            flat = self.b["down_proj"](x.reshape(-1, 64))  # rows end to end, as experts have them
            return self.a["down_proj"](x) + flat.reshape(x.shape)

    network = _bare_llama()
    for layer in network.layers:
        layer.mlp = Mlp()
    config = methods.make("par_bn", {"init": "bert"})
    paths = adapter.attach(network, config)
    assert len(paths) == 4
    assert mx.isfinite(network(IDS)).all().item()


def _bare_llama() -> nn.Module:
    mx.random.seed(0)
    return random_llama(hidden_size=64, intermediate_size=128, vocab_size=32)


def _wide_llama(method: str, **fields: Any) -> nn.Module:
    network = _bare_llama()
    adapter.attach(network, methods.make(method, fields))
    return network


def _tiny_olmo2() -> nn.Module:
    from mlx_lm.models import olmo2

    args = olmo2.ModelArgs(
        model_type="olmo2",
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=32,
    )
    return olmo2.Model(args)


def _random(network: nn.Module) -> Any:
    from mlx.utils import tree_map

    mx.random.seed(5)
    return tree_map(lambda a: a + 0.1 * mx.random.normal(a.shape), network.trainable_parameters())
