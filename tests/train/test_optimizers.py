"""Optimizers by name: against torch where it has them, groups with rates of their own, what is refused."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from small_run import config, examples, flat, tiny

from mlx_adapters import adapter, methods
from mlx_adapters.errors import ConfigError
from mlx_adapters.models import load as model
from mlx_adapters.models import sites
from mlx_adapters.train.config import OPTIMIZER_NAMES
from mlx_adapters.train.loop import Run
from mlx_adapters.train.optimizers import OPTIMIZERS, kinds_of, make_optimizer

START = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
SLOPES = np.random.default_rng(1).normal(size=(8, 6, 5)).astype(np.float32)


def ours(**fields: Any) -> np.ndarray:
    """START after a step along each of SLOPES."""
    settings = config(**({"lr": 1e-2, "warmup": 0, "schedule": "constant"} | fields))
    tree = {"layers": [{"weight": mx.array(START)}]}
    optimizer = make_optimizer(settings, 8, tree)
    for slope in SLOPES:
        tree = optimizer.apply_gradients({"layers": [{"weight": mx.array(slope)}]}, tree)
    return np.array(tree["layers"][0]["weight"])


def in_torch(kind: Any, **arguments: Any) -> np.ndarray:
    weight = torch.nn.Parameter(torch.tensor(START))
    optimizer = kind([weight], lr=1e-2, **arguments)
    for slope in SLOPES:
        weight.grad = torch.tensor(slope)
        optimizer.step()
    return weight.detach().numpy()


@pytest.mark.parametrize(
    ("fields", "kind", "arguments"),
    [
        ({"optimizer": "adamw", "weight_decay": 0.1}, torch.optim.AdamW, {"weight_decay": 0.1}),
        (
            {"optimizer": "adamw", "optimizer_args": "betas=0.8:0.95,eps=1e-6"},
            torch.optim.AdamW,
            {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0},
        ),
        ({"optimizer": "adam"}, torch.optim.Adam, {}),
        ({"optimizer": "sgd", "weight_decay": 0.1}, torch.optim.SGD, {"weight_decay": 0.1}),
        (
            {"optimizer": "sgd", "optimizer_args": "momentum=0.9,nesterov=true"},
            torch.optim.SGD,
            {"momentum": 0.9, "nesterov": True},
        ),
    ],
)
def test_steps_are_those_of_torch(fields: dict[str, Any], kind: Any, arguments: dict[str, Any]) -> None:
    np.testing.assert_allclose(ours(**fields), in_torch(kind, **arguments), atol=1e-5)


def test_adafactor_is_that_of_transformers() -> None:
    from transformers import Adafactor

    theirs = in_torch(Adafactor, relative_step=False, scale_parameter=False)
    np.testing.assert_allclose(ours(optimizer="adafactor"), theirs, atol=1e-5)


def test_lion_follows_its_paper() -> None:
    """Chen et al. 2023, algorithm 2: the sign of an average, and decoupled weight decay."""
    weight, moment = START.copy(), np.zeros_like(START)
    for slope in SLOPES:
        weight -= 1e-2 * (np.sign(0.9 * moment + 0.1 * slope) + 0.1 * weight)
        moment = 0.99 * moment + 0.01 * slope
    np.testing.assert_allclose(ours(optimizer="lion", weight_decay=0.1), weight, atol=1e-5)


def test_muon_moves_matrices_by_nearly_orthogonal_steps() -> None:
    tree = {"weight": mx.array(START), "bias": mx.zeros((5,))}
    optimizer = make_optimizer(config(optimizer="muon", warmup=0, schedule="constant", lr=1e-2), 8, tree)
    slopes = {"weight": mx.array(SLOPES[0]), "bias": mx.array(SLOPES[0][0])}
    after = optimizer.apply_gradients(slopes, tree)
    step = (np.array(after["weight"]) - START) / (1e-2 * math.sqrt(6 / 5))
    sizes = np.linalg.svd(step, compute_uv=False)
    assert sizes.min() > 0.6  # five Newton-Schulz steps bring all singular values near 1
    assert sizes.max() < 1.3
    # vectors go to AdamW, whose first step is the rate
    np.testing.assert_allclose(np.abs(np.array(after["bias"])), 1e-2, rtol=1e-3)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_each_lowers_the_loss_and_resumes(name: str, tmp_path: Any) -> None:
    assert set(OPTIMIZERS) == set(OPTIMIZER_NAMES)
    rate = {"lion": 3e-3, "sgd": 1.0}.get(name, 1e-2)
    settings = config(optimizer=name, lr=rate, steps=30, save_every=100, rates="lora_b=2")
    whole = tiny()
    losses = [step.loss for step in Run(whole, examples(), config=settings)]
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    begun, gone_on = tiny(), tiny()
    run = Run(begun, examples(), config=settings, folder=tmp_path)
    for step in run:
        if step.step == 13:
            break
    run.save()
    resumed = Run(gone_on, examples(), config=settings, folder=tmp_path)
    assert resumed.resume() == 13
    list(resumed)
    a, b = flat(whole), flat(gone_on)
    assert all(np.array_equal(a[key], b[key]) for key in a)


def moved(**fields: Any) -> dict[str, float]:
    """How far SGD moves each trained array in a step."""
    model = tiny()
    for path, array in tree_flatten(model.trainable_parameters()):
        if path.endswith("lora_b"):  # both have a gradient then
            model.update(tree_unflatten([(path, array + 0.1)]), strict=False)
    before = flat(model)
    settings = config(optimizer="sgd", steps=1, warmup=0, schedule="constant", lr=1.0, clip=0.0, **fields)
    list(Run(model, examples(), config=settings))
    after = flat(model)
    return {path: float(np.abs(after[path] - before[path]).max()) for path in before}


def test_rates_by_name_and_by_path() -> None:
    plain, scaled = moved(), moved(rates="*.layers.0.*=0.5,lora_b=3")
    for path, distance in plain.items():
        factor = 0.5 if ".layers.0." in path else 3.0 if path.endswith("lora_b") else 1.0
        assert distance > 0
        assert scaled[path] == pytest.approx(factor * distance, rel=1e-2)


def test_arrays_left_out_of_weight_decay_stay() -> None:
    tree = {"norm": {"weight": mx.ones((3,))}, "lora_a": mx.ones((2, 3)), "bias": mx.ones((3,))}
    slopes = {"norm": {"weight": mx.zeros((3,))}, "lora_a": mx.zeros((2, 3)), "bias": mx.zeros((3,))}
    settings = config(weight_decay=0.5, warmup=0, schedule="constant", lr=0.1)
    after = make_optimizer(settings, 4, tree).apply_gradients(slopes, tree)
    assert after["lora_a"].max().item() == pytest.approx(0.95)
    assert after["norm"]["weight"].min().item() == after["bias"].min().item() == 1.0


@pytest.mark.parametrize("arch", ["gpt2", "gptj", "gpt_neo", "gpt_neox", "llama", "gemma", "phi", "qwen3"])
@pytest.mark.parametrize("method", ["ln_tuning", "lora"])
@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT of a norm, which it does support
def test_weight_decay_is_on_the_parameters_that_transformers_decays(
    method: str, arch: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Its trainer goes by type (gpt2, gptj and gpt_neo call their norms ln_1) and by name."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Trainer

    loaded = model.load(folders[arch])
    chosen, base = methods.make(method, {}), model.describe(loaded)
    adapter.attach(loaded, chosen)
    meta = adapter.AdapterMeta(method=chosen, base=base)
    adapter.save(loaded.model, tmp_path, meta=meta)
    theirs = AutoModelForCausalLM.from_pretrained(folders[arch] / "torch")
    theirs = PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    decayed = Trainer.get_decay_parameter_names(None, theirs)
    expected = {
        name.replace(".default", ""): name in decayed
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    ones = tree_map(mx.ones_like, loaded.model.trainable_parameters())
    settings = config(weight_decay=0.5, warmup=0, schedule="constant", lr=0.1)
    optimizer = make_optimizer(settings, 4, ones, kinds=kinds_of(loaded.model))
    after = optimizer.apply_gradients(tree_map(mx.zeros_like, ones), ones)
    inside = {"own.weight": "ln_tuning_layers.weight", "own.bias": "ln_tuning_layers.bias"}
    inside |= {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    found = {}
    for path, array in tree_flatten(after):
        tail = next(tail for tail in inside if path.endswith("." + tail))
        name = sites.to_hf(path.removesuffix("." + tail), arch)
        found[f"base_model.model.{name}.{inside[tail]}"] = bool(array.max() < 1)
    assert found == expected
    assert any(expected.values()) == (method == "lora")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optimizer": "adamm"}, "optimizer 'adamm'.*adamw"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "adam has none"),
        ({"optimizer_args": "beta=0.9"}, "argument 'beta'.*betas"),
        ({"optimizer_args": "eps=small"}, "eps=small"),
        ({"optimizer_args": "eps"}, "name=value"),
        ({"rates": "lora_c=2"}, "'lora_c'.*lora_a, lora_b"),
        ({"rates": "lora_a=-1"}, "lora_a=-1"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_optimizer(config(**fields), 4, tiny().trainable_parameters())
