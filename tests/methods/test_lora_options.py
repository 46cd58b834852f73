"""What LoRA can do besides: PiSSA, LoRA+, patterns, embeddings, modules trained whole."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from adapted import IDS, attached, bound, logits
from cases import Method
from mlx_lm.tuner.utils import load_adapters
from tiny import make_tiny
from transformers import AutoModelForCausalLM

from mlx_adapters import adapter, methods
from mlx_adapters.adapter.combine import combine
from mlx_adapters.convert import exchange, peft
from mlx_adapters.convert.against_torch import quiet_transformers
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.load_adapter import load_adapter
from mlx_adapters.convert.to_transformers import write_transformers
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import AdaptersError, ConfigError
from mlx_adapters.models import load as model
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {}
    for name, arch, fields in (
        ("llama", "llama", {}),
        ("tied", "qwen2", {"tie_word_embeddings": True}),
        ("gpt_neox", "gpt_neox", {}),
        ("gptj", "gptj", {}),
    ):
        made[name] = root / f"mlx-{name}"
        convert(make_tiny(arch, root / name, **fields), made[name])
        loaded = model.load(made[name])
        write_transformers(loaded.model, loaded.config, made[name] / "torch")
    return made


WHOLE = [
    ("llama", {"targets": "embed_tokens,q_proj"}),
    ("tied", {"targets": "embed_tokens,v_proj"}),
    ("gpt_neox", {"targets": "embed_in"}),
    ("llama", {"modules_to_save": "lm_head"}),
    ("llama", {"modules_to_save": "lm_head,embed_tokens"}),
    ("gptj", {"modules_to_save": "lm_head", "targets": "q_proj,wte"}),
]


@pytest.mark.parametrize(("name", "fields"), WHOLE)
def test_pytorch_computes_the_same(
    name: str, fields: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    method = Method("lora", {"rank": 3, **fields})
    fresh, _ = attached(folders[name], method, trained=False)
    np.testing.assert_allclose(logits(fresh), logits(model.load(folders[name])), atol=1e-6)
    loaded, meta = attached(folders[name], method, trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    again = model.load(folders[name])
    adapter.load(again, tmp_path / "a")
    again.model.eval()
    expected = logits(loaded)
    assert np.array_equal(logits(again), expected)
    peft.export(tmp_path / "a", tmp_path / "p", base="owner/base")
    verdict = peft.verify(tmp_path / "p", folders[name])
    assert verdict.missing == verdict.unexpected == ()
    assert verdict.peft_diff <= verdict.bound
    assert verdict.greedy_equal
    assert verdict.effect > 1e-2
    network = AutoModelForCausalLM.from_pretrained(
        folders[name] / "torch", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        theirs = load_adapter(network.eval(), tmp_path / "p")(torch.tensor(IDS.tolist())).logits.numpy()
    np.testing.assert_allclose(theirs, expected, atol=bound(expected))


@pytest.mark.parametrize(("name", "fields"), WHOLE)
def test_every_array_gets_a_gradient_and_the_loss_falls(
    name: str, fields: dict[str, Any], folders: dict[str, Path]
) -> None:
    loaded, _ = attached(folders[name], Method("lora", {"rank": 3, **fields}), trained=False)
    from mlx.utils import tree_flatten

    before = dict(tree_flatten(loaded.model.trainable_parameters()))
    config = TrainConfig(steps=12, batch_size=2, lr=1e-2, warmup=0)
    steps = list(Run(loaded.model, [Example(row, 1) for row in IDS.tolist()], config=config))
    assert steps[-1].loss < steps[0].loss
    after = dict(tree_flatten(loaded.model.trainable_parameters()))
    assert all(not mx.array_equal(array, after[path]) for path, array in before.items())


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("llama", {"modules_to_save": "embed"}, "which this llama model does not have"),
        ("llama", {"trainable_tokens": "64"}, "64 is no token"),
        ("llama", {"trainable_tokens": "4,4"}, "an id twice"),
        ("llama", {"trainable_tokens": "a"}, "write ids of tokens"),
        ("llama", {"trainable_tokens": "4", "targets": "embed_tokens"}, "adapted as a whole too"),
        ("tied", {"trainable_tokens": "lm_head=4"}, "of the head alone"),
        ("llama", {"bias": "some"}, "bias"),
        ("llama", {"modules_to_save": "self_attn"}, "self_attn is a Attention: only linear"),
        ("gpt_neox", {"modules_to_save": "embed_out"}, "transformers 5 lm_head"),
        ("llama", {"rank_pattern": "q_porj=4"}, "q_porj"),
        ("llama", {"rank_pattern": "q_proj:4"}, "NAME=NUMBER"),
        ("llama", {"rank_pattern": "q_proj=2.5"}, "no whole number"),
        ("llama", {"alpha_pattern": "q_proj=nan"}, "NAME=NUMBER"),
        ("llama", {"lora_plus": 0}, "lora_plus"),
    ],
)
def test_refusals(name: str, fields: dict[str, Any], said: str, folders: dict[str, Path]) -> None:
    with pytest.raises(AdaptersError, match=said):
        attached(folders[name], Method("lora", fields), trained=False)


def test_a_tied_embedding_is_not_merged(folders: dict[str, Path]) -> None:
    """PEFT merges it and changes the output head with it: wrong by 9 to 40 in logits."""
    loaded, _ = attached(folders["tied"], Method("lora", {"targets": "embed_tokens"}), trained=True)
    with pytest.raises(ConfigError, match="tied"):
        next(iter(adapter.layers(loaded.model).values())).merge()


def test_pissa_starts_from_the_largest_singular_vectors(folders: dict[str, Path]) -> None:
    fields = {"rank": 4, "alpha": 8.0, "pissa": True, "targets": "q_proj"}
    loaded, _ = attached(folders["llama"], Method("lora", fields), trained=False)
    for path, layer in adapter.layers(loaded.model).items():
        weight = np.array(layer.base.weight)
        u, s, v = np.linalg.svd(weight)
        best = (u[:, :4] * s[:4]) @ v[:4]
        np.testing.assert_allclose(
            np.array(layer.scale * (layer.lora_b @ layer.lora_a)), best, atol=1e-3, err_msg=path
        )


def test_pissa_resumes_bit_for_bit(folders: dict[str, Path], tmp_path: Path) -> None:
    def run(steps: int, folder: Path) -> Run:
        fields = {"rank": 4, "pissa": True, "dropout": 0.1}
        loaded, _ = attached(folders["llama"], Method("lora", fields), trained=False)
        config = TrainConfig(steps=steps, batch_size=1, lr=1e-2, warmup=0, save_every=2, schedule="constant")
        return Run(loaded.model, [Example(row, 1) for row in IDS.tolist()], config=config, folder=folder)

    whole = [step.loss for step in run(6, tmp_path / "a")]
    cut = run(6, tmp_path / "b")
    begun = [step.loss for step, _ in zip(cut, range(4), strict=False)]
    again = run(6, tmp_path / "b")
    assert again.resume() == 4
    assert begun + [step.loss for step in again] == whole


def test_lora_plus_is_torch_s_parameter_groups(folders: dict[str, Path], tmp_path: Path) -> None:
    """B with eight times the rate, weight decay included: PEFT's two groups give the same losses."""
    from peft import PeftModel

    method = Method("lora", {"rank": 4, "lora_plus": 8.0, "targets": "all-linear"})
    loaded, meta = attached(folders["llama"], method, trained=False)
    adapter.save(loaded.model, tmp_path, meta=meta)
    config = TrainConfig(
        steps=15, batch_size=2, lr=1e-3, warmup=0, schedule="constant", weight_decay=0.1, clip=0
    )
    examples = [Example(row, 1) for row in IDS.tolist()]
    rates = methods.make("lora", method.fields).lr_multipliers()
    ours = [s.loss for s in Run(loaded.model, examples, config=config, rates=rates)]
    plain = attached(folders["llama"], method, trained=False)[0].model
    without = [s.loss for s in Run(plain, examples, config=config)]
    base = AutoModelForCausalLM.from_pretrained(folders["llama"] / "torch", dtype=torch.float32)
    network = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    groups: dict[str, list[Any]] = {"A": [], "B": []}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups["B" if "lora_B" in name else "A"].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups["A"], "lr": 1e-3}, {"params": groups["B"], "lr": 8e-3}], weight_decay=0.1
    )
    ids, theirs = torch.tensor(IDS.tolist()), []
    for _ in range(15):
        loss = network(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert abs(without[-1] - theirs[-1]) > 1e-2, "the negative control: with one rate it is another run"


def test_patterns_read_from_peft(folders: dict[str, Path], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(
        folders["llama"] / "torch", dtype=torch.float32, attn_implementation="eager"
    )
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2, r"layers\.0\.self_attn\.q_proj": 7},
        alpha_pattern={"q_proj": 11},
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    network = get_peft_model(base, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = network.eval()(torch.tensor(IDS.tolist())).logits.numpy()
    network.save_pretrained(tmp_path)
    loaded = model.load(folders["llama"])
    adapter.load(loaded, tmp_path)
    loaded.model.eval()
    np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected))
    assert isinstance(adapter.layers(loaded.model)["lm_head"], nn.Module)


@pytest.mark.parametrize(
    ("name", "target"), [("llama", "embed_tokens"), ("tied", "embed_tokens"), ("gptj", "wte")]
)
def test_an_embedding_adapter_of_peft_loads(
    name: str, target: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT writes the whole table beside it where the embedding is called embed_tokens."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(
        folders[name] / "torch", dtype=torch.float32, attn_implementation="eager"
    )
    with quiet_transformers():
        network = get_peft_model(base, LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = network.eval()(torch.tensor(IDS.tolist())).logits.numpy()
    network.save_pretrained(tmp_path, save_embedding_layers=target == "embed_tokens")
    names = adapter.read_tensors(tmp_path)
    assert any(key.endswith("base_layer.weight") for key in names) == (target == "embed_tokens")
    loaded = model.load(folders[name])
    adapter.load(loaded, tmp_path)
    loaded.model.eval()
    np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected))
    if target == "embed_tokens":
        table = next(key for key in names if key.endswith("base_layer.weight"))
        mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), names | {table: 2 * names[table]})
        with pytest.raises(AdaptersError, match="along with other values"):
            adapter.load(model.load(folders[name]), tmp_path)


def test_patterns_count_wherever_a_scale_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """Merging adapters and mlx-lm's folders take each layer's own scale, to the last digit."""
    fields = {"rank": 4, "targets": "q_proj,o_proj", "alpha_pattern": "q_proj=1.23456789,o_proj=11"}
    loaded, meta = attached(folders["llama"], Method("lora", fields), trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    expected = logits(loaded)
    read = methods.find("lora").from_peft(adapter.read_fields(tmp_path / "a"))
    assert read.at("x.q_proj") == (4, 1.23456789 / 4)
    combine([tmp_path / "a"], [1.0], tmp_path / "merged")
    again = model.load(folders["llama"])
    adapter.load(again, tmp_path / "merged")
    again.model.eval()
    np.testing.assert_allclose(logits(again), expected, atol=bound(expected))
    with pytest.raises(AdaptersError, match="one scale"):
        exchange.export(tmp_path / "a", tmp_path / "two", format="mlx-lm")
    one = Method("lora", {"rank": 4, "alpha": 6.0, "targets": "attn", "rank_pattern": ".*=3"})
    loaded, meta = attached(folders["llama"], one, trained=True)
    adapter.save(loaded.model, tmp_path / "b", meta=meta)
    exchange.export(tmp_path / "b", tmp_path / "theirs", format="mlx-lm")
    network = load_adapters(model.load(folders["llama"]).model, str(tmp_path / "theirs"))
    network.eval()
    np.testing.assert_allclose(np.array(network(IDS)), logits(loaded), atol=bound(expected))


def test_pissa_keeps_patterns_when_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    """Twice the rank with sqrt(2) alpha is no round number: as text it must lose no digit."""
    fields = {
        "rank": 4,
        "rslora": True,
        "pissa": True,
        "targets": "q_proj,v_proj",
        "alpha_pattern": "q_proj=7",
    }
    loaded, meta = attached(folders["llama"], Method("lora", fields), trained=True)
    adapter.save(loaded.model, tmp_path, meta=meta)
    again = model.load(folders["llama"])
    adapter.load(again, tmp_path)
    ours, theirs = adapter.layers(loaded.model), adapter.layers(again.model)
    assert all(abs(theirs[path].scale - layer.scale) < 1e-15 for path, layer in ours.items())
