"""The balance of a mixture's experts as a part of the loss: value and gradient are those of transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapted import attached
from cases import Method
from mlx.utils import tree_flatten
from peft import PeftModel
from tiny import make_tiny
from transformers import AutoModelForCausalLM

from mlx_adapters import adapter
from mlx_adapters.convert import peft
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import ConfigError, UnsupportedError
from mlx_adapters.models.routers import routers
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run
from mlx_adapters.train.loss import split_head

ROWS = [[4, 5, 6, 7, 8, 9, 10, 11, 5], [11, 10, 9, 8, 7]]
WEIGHT = 0.3
METHOD = Method("lora", {"rank": 2, "targets": "attn,experts"})


def in_torch(source: Path, folder: Path) -> tuple[float, float, dict[str, np.ndarray]]:
    """(loss, balance, gradient by PEFT's name) of transformers on `ROWS`, the shorter one padded."""
    base = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager", router_aux_loss_coef=WEIGHT
    )
    network = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    ids, mask = torch.zeros((2, 9), dtype=torch.long), torch.zeros((2, 9), dtype=torch.long)
    for number, row in enumerate(ROWS):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
    labels = torch.where(mask.bool(), ids, -100)
    out = network(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    out.loss.backward()
    slopes = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }
    return out.loss.item(), out.aux_loss.item(), slopes


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss", "granitemoe", "olmoe"])
def test_value_and_gradient_are_those_of_transformers(arch: str, tmp_path: Path) -> None:
    source = make_tiny(arch, tmp_path)
    convert(source, tmp_path / "mlx")
    loaded, meta = attached(tmp_path / "mlx", METHOD, trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    peft.export(tmp_path / "a", tmp_path / "p", base="owner/base")
    loss, aux, slopes = in_torch(source, tmp_path / "p")
    found: dict[str, tuple[float, dict[str, Any]]] = {}
    for name, weight in (("with", WEIGHT), ("without", 0.0)):
        config = TrainConfig(steps=1, batch_size=2, router_aux_loss=weight)
        run = Run(loaded.model, [Example(row, 1) for row in ROWS], config=config)
        _, (batch,) = next(iter(run.step_batches()))
        gradient = run.gradient_fn(split_head(loaded.model), share=False)
        value, (tree, _) = gradient(loaded.model.trainable_parameters(), ([], []), [batch])
        own = {path: array / batch.supervised for path, array in tree_flatten(tree)}
        found[name] = float(value / batch.supervised), own
    assert found["with"][0] == pytest.approx(loss, abs=1e-5)
    assert (found["with"][0] - found["without"][0]) / WEIGHT == pytest.approx(aux, abs=1e-4)
    assert aux > 2.001, "the routers do not balance by themselves"
    layers = adapter.layers(loaded.model)
    compared = 0
    for path, array in found["with"][1].items():
        at, _, attribute = path.rpartition(".")
        (theirs,) = (s for n, s in slopes.items() if _is(n, at, layers[at].TENSORS[attribute]))
        np.testing.assert_allclose(np.array(array), theirs, atol=1e-5 + 1e-4 * np.abs(theirs).max())
        compared += not np.allclose(array, found["without"][1][path], atol=1e-5)
    assert compared >= 4, "the balance must reach the adapters below the routers"


def _is(name: str, path: str, suffix: str) -> bool:
    """Whether PEFT's `name` is that of an array of the layer at `path`."""
    number, _, rest = path.partition(".layers.")[2].partition(".")
    end = f".{rest}.{suffix}" if "attn" in rest else f".experts.{suffix}"
    return f".layers.{number}." in name and name.endswith(end)


def losses(folder: Path, **settings: Any) -> list[float]:
    loaded, _ = attached(folder, Method("lora", {"rank": 2, "targets": "gate,q_proj"}), trained=False)
    assert len(routers(loaded.model)) == 2, "a router with an adapter on it is a router"
    config = TrainConfig(lr=1e-2, warmup=0, router_aux_loss=WEIGHT, **settings)
    return [step.loss for step in Run(loaded.model, [Example(row, 1) for row in ROWS], config=config)]


def test_it_trains_and_packed_rows_count_the_same(tmp_path: Path) -> None:
    convert(make_tiny("qwen3_moe", tmp_path), tmp_path / "mlx")
    apart = losses(tmp_path / "mlx", steps=4, batch_size=2)
    assert apart[-1] < apart[0]
    (packed,) = losses(tmp_path / "mlx", steps=1, batch_size=1, packing=True, max_length=32)
    assert packed == pytest.approx(apart[0], abs=1e-5), "which row a token stands in is all the same"


@pytest.mark.slow
def test_compiled_steps_are_the_same(tmp_path: Path) -> None:
    convert(make_tiny("qwen3_moe", tmp_path), tmp_path / "mlx")
    plain, compiled = (losses(tmp_path / "mlx", steps=3, batch_size=2, compile=how) for how in ("off", "on"))
    np.testing.assert_allclose(compiled, plain, atol=1e-5)


def test_refused_where_no_router_is_found(tmp_path: Path) -> None:
    said = {"llama": "no stacked experts", "glm4_moe": "no linear layer beside the experts"}
    for arch, reason in said.items():
        convert(make_tiny(arch, tmp_path), tmp_path / f"mlx-{arch}")
        loaded, _ = attached(tmp_path / f"mlx-{arch}", Method("lora"), trained=False)
        with pytest.raises(UnsupportedError, match=reason):
            Run(loaded.model, [Example([4, 5], 1)], config=TrainConfig(router_aux_loss=0.1))
    with pytest.raises(ConfigError, match="leave gradient_checkpointing off"):
        TrainConfig(router_aux_loss=0.1, gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="router_aux_loss=-1"):
        TrainConfig(router_aux_loss=-1)
