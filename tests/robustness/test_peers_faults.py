"""Faults that were proven in other MLX trainers (peers.md, sections 3 to 5), each as a test of ours.

Those that need more room have it elsewhere: gradients under checkpointing in test_recompute.py, partial
windows and token weights in test_train.py, resuming in test_checkpoint.py, PEFT in test_exchange.py.
"""

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapted import attached
from cases import METHODS
from mlx.utils import tree_flatten
from small_run import config, examples, flat, tiny
from tiny import random_llama

import mlx_adapters
from mlx_adapters import adapter, methods
from mlx_adapters.data.batches import batches, make_batch
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import AdaptersError, ConfigError
from mlx_adapters.models import load as model
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run
from mlx_adapters.train.loss import loss_sum, split_head
from mlx_adapters.train.validation import validate

SOURCE = Path(mlx_adapters.__file__).parent


def test_no_pad_token_is_trained() -> None:
    """mlx-lm counts three targets in a row of three tokens; there are two."""
    rows = [[Example([5, 6, 7], 1)], [Example(list(range(5, 25)), 1)]]
    batch = make_batch(rows, pad_id=0)
    assert batch.supervised == 2 + 19
    assert int(batch.weights.sum()) == 21
    assert batch.label_mask[0].tolist()[:4] == [0, 1, 1, 0]
    other = make_batch(rows, pad_id=9)
    network = tiny()
    head = split_head(network)
    losses = [float(loss_sum(network, given, head=head)) for given in (batch, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_row_without_targets_is_no_nan() -> None:
    """0/0 in mlx-lm with --mask-prompt where the prompt fills the row: every weight is NaN from then on."""
    rows = [Example([5, 6, 7, 8], 4), Example([5, 6, 7, 8], 4)]
    steps = list(Run(tiny(), rows, config=config(steps=3)))
    assert [step.loss for step in steps] == [0, 0, 0]
    mixed = [*rows, Example([5, 6, 7, 8], 2)]
    assert all(np.isfinite(step.loss) for step in Run(tiny(), mixed, config=config(steps=6, batch_size=1)))


def test_the_length_sort_sorts() -> None:
    """mlx-lm sorts by the length of a dictionary: 2.25 times the tokens on a mixed set."""
    rng = np.random.default_rng(0)
    items = [Example(list(range(5, 5 + n)), 1) for n in rng.choice([10, 20, 40, 80, 160], 400)]
    made = batches(items, batch_size=8, pad_id=0)
    computed = sum(batch.ids[:, 1:].size for batch in made)
    assert computed < 1.15 * sum(len(item.ids) for item in items)


@pytest.mark.parametrize("count", [1, 3, 10])
def test_the_last_partial_batch_is_trained_and_measured(count: int) -> None:
    """10 rows in batches of 4: mlx-lm trains on 8, scores 8, and raises below 4."""
    items = examples(count)
    steps = list(Run(tiny(), items, config=config(steps=None, epochs=1)))
    assert sum(step.tokens for step in steps) == sum(len(item.ids) for item in items)
    network = tiny()
    every = validate(network, items, batch_size=4, pad_id=0)
    sums = [
        validate(network, [item], batch_size=1, pad_id=0) * (len(item.ids) - item.loss_start)
        for item in items
    ]
    assert every == pytest.approx(
        sum(sums) / sum(len(item.ids) - item.loss_start for item in items), rel=1e-5
    )


@pytest.mark.parametrize("targets", ["q_proj,nonsense", "auto", "self_attn.q_proj_typo"])
def test_unmatched_targets_are_an_error(targets: str) -> None:
    """`keys=["q_proj"]` converts no layer in mlx-lm, and says nothing."""
    chosen = methods.make("lora", {"targets": targets})
    with pytest.raises(AdaptersError, match=targets.split(",")[-1]):
        adapter.attach(random_llama(), chosen)


def test_every_option_is_read_somewhere() -> None:
    """mlx-lm parses --clear-cache-threshold and never passes it; mlx-tune ignores nine options."""
    used: set[str] = set()
    for file in [*SOURCE.rglob("*.py"), *SOURCE.parent.glob("c*/*.py")]:
        tree = ast.parse(file.read_text())
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if file.name == "config.py" and file.parent.name == "train":
            continue
        used |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    for kind in (TrainConfig, *(methods.find(name) for name in methods.names())):
        unread = [field.name for field in dataclasses.fields(kind) if field.name not in used]
        assert not unread, f"{kind.__module__}: {unread}"


@pytest.mark.parametrize(
    "changed",
    [
        {"lr": 2e-2},
        {"warmup": 5},
        {"schedule": "constant"},
        {"weight_decay": 0.5},
        {"clip": 1e-3},
        {"seed": 4},
        {"batch_size": 3},
        {"accumulation": 2},
        {"optimizer": "lion"},
        {"optimizer_args": "eps=0.1"},
        {"rates": "lora_a=0.1"},
        {"neftune": 5.0},
    ],
)
def test_every_option_of_the_course_changes_the_result(changed: dict[str, Any]) -> None:
    plain, other = tiny(), tiny()
    list(Run(plain, examples(), config=config()))
    list(Run(other, examples(), config=config(**changed)))
    left, right = flat(plain), flat(other)
    assert any(not np.array_equal(left[name], right[name]) for name in left)


def test_checkpointing_leaves_prefix_gradients(folders: dict[str, Path]) -> None:
    """Exactly zero, silently, with mlx-lm's grad_checkpoint."""
    loaded, _ = attached(folders["llama"], METHODS["prefix"], trained=True)
    (step,) = Run(loaded.model, examples(4), config=config(steps=1, gradient_checkpointing=True))
    assert step.grad_norm > 1e-4
    loaded, _ = attached(folders["llama"], METHODS["prefix"], trained=True)
    (plain,) = Run(loaded.model, examples(4), config=config(steps=1))
    assert step.grad_norm == pytest.approx(plain.grad_norm, rel=1e-4)


def test_checkpointing_twice_does_not_nest() -> None:
    """mlx-lm patches the class for the process: a second training computes every block twice again."""
    network = tiny()
    for _ in range(3):
        list(Run(network, examples(4), config=config(steps=1, gradient_checkpointing=True)))
    block = type(network.layers[0])
    assert sum("_recomputes" in vars(kind) for kind in block.__mro__) == 1
    assert "_recomputes" not in dir(type(random_llama().layers[0]))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_dora_on_every_width(bits: int) -> None:
    """mlx-lm computes the input size as dims * (32 // bits): wrong for 3, 5 and 6 bits."""
    mx.random.seed(0)
    network = random_llama(hidden_size=64, intermediate_size=128)
    nn.quantize(network, group_size=32, bits=bits)
    chosen = methods.make("dora", {"rank": 4, "targets": "all-linear"})
    adapter.attach(network, chosen)
    steps = list(Run(network, examples(), config=config(steps=20)))
    assert steps[-1].loss < steps[0].loss


def test_the_cache_is_not_cleared_in_the_loop() -> None:
    """mlx-lm clears MLX's buffer cache after every step: all of it is allocated again in the next."""
    for file in (SOURCE / "train").glob("*.py"):
        assert "clear_cache" not in file.read_text(), file.name


@pytest.mark.parametrize("steps", [120, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_and_is_told(steps: int) -> None:
    network = tiny()
    held = []
    for step in Run(network, examples(), config=config(steps=steps)):
        assert step.memory > 0
        if step.step % (steps // 6) == 0:
            mx.synchronize()
            held.append(mx.get_active_memory())
    assert max(held[1:]) <= held[1] * 1.01 + 4096, held


def test_the_scale_is_alpha_over_rank() -> None:
    """mlx-lm's default scale of 20 is alpha 160 at rank 8; mlx-vlm used alpha itself."""
    network = random_llama()
    chosen = methods.make("lora", {"rank": 4, "alpha": 12.0})
    adapter.attach(network, chosen)
    assert {layer.scale for layer in adapter.layers(network).values()} == {3.0}


def test_detaching_leaves_no_layer_behind(folders: dict[str, Path]) -> None:
    """mlx-lm's remove_lora_layers leaves all DoRA layers in place; here a fresh model is the base."""
    loaded, _ = attached(folders["llama"], METHODS["dora"], trained=True)
    assert adapter.layers(loaded.model)
    assert not adapter.layers(model.load(folders["llama"]).model)


def test_an_epoch_sees_every_row_once() -> None:
    """mlx-lm-lora permutes anew every step: after an epoch's steps 40 of 64 rows had been seen."""
    items = [Example([n + 3, n + 4, 2], 1) for n in range(40)]
    run = Run(tiny(), items, config=config(steps=None, epochs=2, batch_size=8))
    seen = [int(row[0]) for _, step in run.step_batches() for batch in step for row in batch.ids]
    assert len(seen) == 80
    assert sorted(seen[:40]) == sorted(seen[40:]) == [n + 3 for n in range(40)]


def test_nothing_runs_code_from_a_checkpoint() -> None:
    for file in SOURCE.rglob("*.py"):
        assert not re.search(r"trust_remote_code\s*=\s*True|\bpickle\.load", file.read_text()), file


def test_an_unknown_option_is_an_error_with_the_nearest_name() -> None:
    from mlx_adapters.fields import parse_fields

    with pytest.raises(ConfigError, match=r"gradient_checkpointing"):
        parse_fields(TrainConfig, {"gradient_checkpoint": True}, where="train")
    assert "kwargs" not in inspect.signature(TrainConfig).parameters


def test_the_base_stays_frozen_whatever_the_optimizer() -> None:
    for name in ("adamw", "muon"):
        network = tiny()
        before = {k: np.array(v) for k, v in tree_flatten(network.parameters()) if "lora" not in k}
        list(Run(network, examples(), config=config(optimizer=name, weight_decay=0.1)))
        after = dict(tree_flatten(network.parameters()))
        assert all(np.array_equal(array, np.array(after[key])) for key, array in before.items())
