"""Gemma 3n, whose last layers attend to the keys of earlier ones: it trains as in transformers."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import make_tokenizer

from mlx_adapters import adapter, methods
from mlx_adapters.adapter.call import call_model, needs_cache
from mlx_adapters.data.tokens import Example
from mlx_adapters.generate.decode import generate_ids
from mlx_adapters.models import load as model
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run

torch = pytest.importorskip("torch")

FIELDS: dict[str, Any] = {
    **{"vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size": 32, "intermediate_size": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size_per_layer_input": 8},
    **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 6, "laurel_rank": 4},
    **{"layer_types": ["sliding_attention", "full_attention"] * 2, "altup_num_inputs": 2},
    **{"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "max_position_embeddings": 256},
    **{"altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_active_idx": 0, "rms_norm_eps": 1e-6},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "final_logit_softcapping": 30.0},
    **{"rope_local_base_freq": 10000.0, "rope_theta": 500.0},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(a model folder as Google's are, transformers' model of the same weights)."""
    from safetensors.torch import save_file
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    torch.manual_seed(0)
    theirs = Gemma3nForCausalLM(Gemma3nTextConfig(**FIELDS)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15)
    folder = tmp_path_factory.mktemp("gemma3n")
    make_tokenizer(folder)
    named = {k.replace("model.", "model.language_model.", 1): v for k, v in theirs.state_dict().items()}
    named.pop("lm_head.weight")
    for name in [name for name in named if ".layers.0.self_attn." in name]:
        for shared in ("2", "3"):  # the released files have them too, and nothing reads them
            named.setdefault(name.replace(".0.", f".{shared}.", 1), torch.randn_like(named[name]))
    save_file(
        {k: v.clone() for k, v in named.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    text = FIELDS | {"model_type": "gemma3n_text"}
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3n", "text_config": text}))
    return folder, theirs


def rows() -> list[list[int]]:
    drawn = np.random.default_rng(0)
    return [drawn.integers(3, 64, length).tolist() for length in (14, 9, 5)]


def losses(theirs: Any, given: list[list[int]]) -> Any:
    """The mean cross entropy over the targets of all rows, each read alone."""
    total: Any = 0.0
    count = 0
    for row in given:
        logits = theirs(torch.tensor([row[:-1]])).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum")
        count += len(row) - 1
    return total / count


def test_it_is_read_as_transformers_reads_it(pair: tuple[Path, Any]) -> None:
    folder, theirs = pair
    network = model.load(folder).model
    assert needs_cache(network)
    row = rows()[0]
    with torch.no_grad():
        expected = theirs(torch.tensor([row])).logits.numpy()
    for read in (call_model, type(network).__call__):  # the second one is given no cache, and makes its own
        found = np.array(read(network, mx.array([row])))
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(AttributeError, match="k_proj"):  # what mlx-lm's reads without one is not there
        network.model(mx.array([row]))


@pytest.mark.parametrize("again", [False, True], ids=["plain", "recomputed blocks"])
def test_its_first_loss_and_gradient_are_those_of_peft(again: bool, pair: tuple[Path, Any]) -> None:
    """No adapter stands on the keys and values that its last layers have and do not use."""
    from peft import LoraConfig, get_peft_model

    folder, theirs = pair
    loaded = model.load(folder)
    config = methods.make("lora", {"rank": 2, "alpha": 2, "targets": "q_proj,k_proj,v_proj"})
    paths = adapter.attach(loaded, config)
    names = ["q_proj", "k_proj", "v_proj"]
    peft = get_peft_model(theirs, LoraConfig(r=2, lora_alpha=2, target_modules=names))
    placed = {
        name.removeprefix("base_model.model."): module.lora_A["default"]
        for name, module in peft.named_modules()
        if name.endswith("_proj") and hasattr(module, "lora_A")
    }
    try:
        ours = {path.replace("language_model.", ""): path for path in paths}
        assert set(ours) == set(placed)
        layers = adapter.layers(loaded.model)
        with torch.no_grad():
            for name, path in ours.items():
                placed[name].weight.copy_(torch.tensor(np.array(layers[path].lora_a)))
        expected = losses(theirs, rows())
        expected.backward()
        slopes = [p.grad for p in peft.parameters() if p.requires_grad and p.grad is not None]
        norm = float(sum(slope.square().sum() for slope in slopes)) ** 0.5
    finally:
        peft.unload()
    settings = TrainConfig(steps=1, batch_size=3, gradient_checkpointing=again)
    (step,) = Run(loaded.model, [Example(row, 1) for row in rows()], config=settings)
    assert step.loss == pytest.approx(expected.item(), rel=1e-5)
    assert step.grad_norm == pytest.approx(norm, rel=1e-4)


def test_its_answers_are_those_of_transformers(pair: tuple[Path, Any]) -> None:
    folder, theirs = pair
    network = model.load(folder).model
    found = dict(generate_ids(network, rows(), stop=frozenset(), max_tokens=8, batch_size=3))
    for index, row in enumerate(rows()):
        text = list(row)
        with torch.no_grad():
            for _ in range(8):
                text.append(int(theirs(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        assert found[index] == text[len(row) :]
