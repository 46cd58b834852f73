"""LoRA on attention, experts and routers of every family with a mixture: PEFT computes the same, and back."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from adapted import attached, bound, change
from cases import Method
from families import TEXT, make_family, opened
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from mlx_adapters import adapter, methods
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.adapter.call import call_model
from mlx_adapters.convert import exchange, peft
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import AdapterError, UnsupportedError
from mlx_adapters.generate.decode import generate_ids
from mlx_adapters.models import load as model
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run

BOTH = [
    {"targets": "attn,experts", "rank": 3, "alpha": 5.0, "rank_pattern": r"experts\.gate_up_proj=2"},
    {"targets": "all-linear,experts", "rank": 2, "rslora": True},
]
FAMILIES = [
    "gpt_oss",
    "gemma4_text:experts",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            *("deepseek_v2", "deepseek_v3", "exaone_moe", "glm4_moe", "granitemoe", "granitemoehybrid"),
            *(
                "lfm2_moe",
                "ernie4_5_moe",
                "minimax_m2",
                "mixtral",
                "olmoe",
                "phimoe",
                "qwen2_moe",
                "qwen3_moe",
            ),
        )
    ),
]


def logits(network: Any) -> np.ndarray:
    if isinstance(network, model.LanguageModel):
        return np.array(call_model(network.model, mx.array(TEXT)))
    with torch.no_grad():
        return network(torch.tensor(TEXT)).logits.numpy()


def in_peft(source: Path, folder: Path) -> np.ndarray:
    """The logits of PEFT, which must miss nothing and find nothing that it does not know."""
    network = PeftModel.from_pretrained(opened(source), folder).eval()
    tensors = load_file(folder / adapter.WEIGHTS)
    assert peft._strict(network, tensors, opened(source)) == ((), ())
    return logits(network)


def handed_over(mlx: Path, source: Path, root: Path, fields: dict[str, Any]) -> None:
    """An adapter of random values through PEFT and back, as if PEFT had written it."""
    loaded, meta = attached(mlx, Method("lora", fields), trained=True)
    ours, base = logits(loaded), logits(model.load(mlx))
    assert np.abs(ours - base).max() > 1e-1
    adapter.save(loaded.model, root / "a", meta=meta)
    peft.export(root / "a", root / "p", base="owner/base")
    np.testing.assert_allclose(in_peft(source, root / "p"), ours, atol=bound(ours))
    for own in (adapter.META, adapter.SEEN):
        (root / "p" / own).unlink()
    again = model.load(mlx)
    exchange.import_adapter(root / "p", root / "b", loaded=again)
    again.model.eval()
    np.testing.assert_allclose(logits(again), ours, atol=bound(ours))


# PEFT looks for the keys of a pattern among modules only, and warns of those that parameters have
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")
@pytest.mark.parametrize("name", FAMILIES)
def test_lora_on_experts_is_pefts(name: str, tmp_path: Path) -> None:
    source = make_family(name, tmp_path)
    convert(source, tmp_path / "mlx")
    base = logits(model.load(tmp_path / "mlx"))
    np.testing.assert_allclose(base, logits(opened(source)), atol=bound(base))
    for number, fields in enumerate(BOTH):
        (tmp_path / str(number)).mkdir()
        handed_over(tmp_path / "mlx", source, tmp_path / str(number), fields)


@pytest.mark.slow
def test_experts_without_a_gate(tmp_path: Path) -> None:
    source = make_family("nemotron_h", tmp_path)
    convert(source, tmp_path / "mlx")
    handed_over(tmp_path / "mlx", source, tmp_path, {"rank": 2, "targets": "experts,q_proj,in_proj"})


@pytest.mark.slow
def test_a_layer_whose_weight_transformers_reads_is_not_exported(tmp_path: Path) -> None:
    """Jamba's dt_proj: PEFT's update of it would do nothing."""
    source = make_family("jamba", tmp_path)
    convert(source, tmp_path / "mlx")
    handed_over(tmp_path / "mlx", source, tmp_path, {"rank": 2, "targets": "experts,q_proj,router"})
    loaded, meta = attached(tmp_path / "mlx", Method("lora", {"targets": "dt_proj"}), trained=True)
    adapter.save(loaded.model, tmp_path / "c", meta=meta)
    with pytest.raises(AdapterError, match="PEFT opens no lora on dt_proj"):
        peft.export(tmp_path / "c", tmp_path / "d", base="owner/base")


def in_mxfp4(source: Path) -> None:
    """Write gpt-oss's experts as its published checkpoint has them: blocks and scales of MXFP4."""
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        matrices = mx.array(tensors.pop(name).transpose(1, 2).contiguous().numpy())
        packed, scales = mx.quantize(matrices, group_size=32, bits=4, mode="mxfp4")[:2]
        blocks = np.array(packed.view(mx.uint8)).reshape(*matrices.shape[:2], -1, 16)
        tensors |= {f"{name}_blocks": torch.tensor(blocks), f"{name}_scales": torch.tensor(np.array(scales))}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((source / "config.json").read_text())
    unconverted = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    fields["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": unconverted}
    (source / "config.json").write_text(json.dumps(fields))


def test_gpt_oss_as_published_trains_answers_and_is_handed_over(tmp_path: Path) -> None:
    source = make_family("gpt_oss", tmp_path)
    in_mxfp4(source)
    convert(source, tmp_path / "mlx")
    loaded = model.load(tmp_path / "mlx", dtype="float32")
    experts = dict(loaded.model.named_modules())["model.layers.0.mlp.experts.gate_proj"]
    assert (experts.mode, experts.bits) == ("mxfp4", 4)
    base = logits(loaded)
    np.testing.assert_allclose(base, logits(opened(source)), atol=bound(base))
    method = methods.make("lora", {"targets": "attn,experts", "rank": 2})
    about = model.describe(loaded)
    adapter.attach(loaded, method)
    config = TrainConfig(steps=5, batch_size=2, lr=1e-2, warmup=0)
    losses = [step.loss for step in Run(loaded.model, [Example(row, 1) for row in TEXT], config=config)]
    assert losses[-1] < 0.9 * losses[0]
    change(loaded.model)
    loaded.model.eval()
    adapter.save(loaded.model, tmp_path / "a", meta=AdapterMeta(method=method, base=about, template="plain"))
    peft.export(tmp_path / "a", tmp_path / "p", base="owner/base")
    ours = logits(loaded)
    np.testing.assert_allclose(in_peft(source, tmp_path / "p"), ours, atol=bound(ours))
    (answer,) = dict(generate_ids(loaded.model, TEXT[:1], stop=frozenset(), max_tokens=3)).values()
    assert answer[0] == int(ours[0, -1].argmax())


@pytest.mark.parametrize("stacks", [["experts.down_proj"], ["experts.gate_up_proj"]])
def test_one_stack_alone_is_read(stacks: list[str], tmp_path: Path) -> None:
    """PEFT's names do not say which stack an update is of: its configuration does."""
    source = make_family("gpt_oss", tmp_path)
    convert(source, tmp_path / "mlx")
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=stacks)
    network = get_peft_model(opened(source), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(tmp_path / "theirs")
    expected = logits(network)
    loaded = model.load(tmp_path / "mlx")
    meta = adapter.load(loaded, tmp_path / "theirs")
    loaded.model.eval()
    np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected))
    adapter.save(loaded.model, tmp_path / "ours", meta=meta)
    np.testing.assert_allclose(in_peft(source, tmp_path / "ours"), expected, atol=bound(expected))


def test_a_file_that_lost_a_stack_is_not_completed(tmp_path: Path) -> None:
    convert(make_family("gpt_oss", tmp_path), tmp_path / "mlx")
    loaded, meta = attached(tmp_path / "mlx", Method("lora", {"targets": "experts"}), trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    tensors = load_file(tmp_path / "a" / adapter.WEIGHTS)
    kept = {name: array for name, array in tensors.items() if "base_layer" not in name}
    save_file(kept, tmp_path / "a" / adapter.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"has no base_layer\.lora_A"):
        adapter.load(model.load(tmp_path / "mlx"), tmp_path / "a")


@pytest.mark.parametrize("method", ["prompt", "ptuning"])
def test_prompts_stand_before_gemma4s_scaled_embeddings(method: str, tmp_path: Path) -> None:
    source = make_family("gemma4_text:experts", tmp_path)
    convert(source, tmp_path / "mlx")
    loaded, meta = attached(tmp_path / "mlx", Method(method, {"num_virtual_tokens": 3}), trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    peft.export(tmp_path / "a", tmp_path / "p", base="owner/base")
    ours = logits(loaded)
    network = PeftModel.from_pretrained(opened(source), tmp_path / "p").eval()
    np.testing.assert_allclose(logits(network)[:, -len(TEXT[0]) :], ours, atol=bound(ours))


def test_prompts_are_refused_where_gemma4_looks_tokens_up_by_layer(tmp_path: Path) -> None:
    """Nor can PEFT: transformers asks which token an embedding is of."""
    convert(make_family("gemma4_text", tmp_path), tmp_path / "mlx")
    with pytest.raises(UnsupportedError, match="embed_tokens_per_layer"):
        attached(tmp_path / "mlx", Method("prompt", {"num_virtual_tokens": 3}), trained=False)
