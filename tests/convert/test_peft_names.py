"""Adapters of models that mlx-lm renames, splits or multiplies: PyTorch computes the same with them."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from families import TEXT, make_family, opened
from safetensors.torch import load_file

from mlx_adapters import adapter, methods
from mlx_adapters.convert import exchange
from mlx_adapters.convert.against_torch import auto_class, bound, logits, max_diff
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.errors import AdapterError
from mlx_adapters.models import load as models
from mlx_adapters.models.names import names_of

peft = pytest.importorskip("peft")
DENSE = {
    "intermediate_size": 64,
    "shared_intermediate_size": 64,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
}
# (family, fields of its configuration, targets): wrappers, split and renamed layers, multipliers, norms + 1
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "split": ("granitemoehybrid", DENSE, "q_proj,gate_proj,up_proj,down_proj"),
    "half": ("granitemoehybrid", DENSE, "up_proj"),
    "wrapper": ("mistral3", {}, "all-linear"),
    "opened as text": ("qwen3_5", {}, "all-linear"),
    "multiplied": ("falcon_h1", {}, "q_proj,k_proj,o_proj,gate_proj,down_proj,in_proj"),
}
SLOW = {
    "tower": ("gemma3", {}, "all-linear"),
    "letters": ("lfm2_moe", {}, "all-linear"),
    "norms": ("qwen3_next", {}, "attn"),
    "per layer": ("gemma4", {}, "attn"),
}
PARAMS = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def randomise(model: Any) -> None:
    # a draw at which float32 is near float64: at some, qwen3_5 is 1e-4 away in transformers and here alike
    mx.random.seed(4)
    for layer in adapter.layers(model).values():
        for name in layer.TENSORS:
            if name in layer:
                layer[name] = layer[name] + 0.1 * mx.random.normal(layer[name].shape)


def in_torch(network: Any) -> list[np.ndarray]:
    with torch.no_grad():
        return [network(torch.tensor([ids])).logits[0].numpy() for ids in TEXT]


@pytest.mark.parametrize("case", PARAMS)
def test_an_export_is_the_same_function_in_pytorch(case: str, tmp_path: Path) -> None:
    family, fields, targets = (CASES | SLOW)[case]
    folder = make_family(family, tmp_path, **fields)
    loaded = models.load(folder, dtype="float32")
    network = (
        auto_class(folder).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    )
    rounding = max_diff(logits(loaded.model, TEXT), in_torch(network))
    adapter.attach(loaded, methods.make("lora", {"rank": 2, "targets": targets}))
    randomise(loaded.model)
    ours = logits(loaded.model, TEXT)
    adapter.save(loaded, tmp_path / "a")
    exchange.export(tmp_path / "a", tmp_path / "p", format="peft", base="owner/base")
    adapted = peft.PeftModel.from_pretrained(network, tmp_path / "p").eval()
    keys = peft.set_peft_model_state_dict(adapted, load_file(tmp_path / "p" / "adapter_model.safetensors"))
    assert [name for name in keys.missing_keys if "lora_" in name] == []
    assert keys.unexpected_keys == []
    theirs = in_torch(adapted)
    assert max_diff(ours, theirs) <= bound(theirs) + rounding
    assert rounding <= 10 * bound(theirs), "the bases differ: nothing is compared"
    for place in ("a", "p"):
        if place == "p":  # as one that PEFT wrote
            (tmp_path / "p" / "mlx_adapters.json").unlink()
        back = models.load(folder, dtype="float32")
        adapter.load(back, tmp_path / place)
        assert max_diff(logits(back.model, TEXT), ours) <= bound(theirs), place
        assert len(adapter.layers(back.model)) >= len(adapter.layers(loaded.model))


def test_a_folder_in_mlx_format_knows_its_family(tmp_path: Path) -> None:
    """As those on the hub: quantized, in mlx-lm's names, and without a word of where they came from."""
    source = make_family("qwen3_5", tmp_path)
    convert(source, tmp_path / "mlx", bits=4, group_size=32)
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert "model.language_model.layers.#" in json.dumps(config["mlx_adapters"]["names"])
    measured = names_of(models.load(tmp_path / "mlx").model)
    del config["mlx_adapters"]
    (tmp_path / "mlx" / "config.json").write_text(json.dumps(config))
    assert names_of(models.load(tmp_path / "mlx").model) == measured


def test_what_reaches_a_tower_is_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT finds q_proj in the tower for images, too; text does not pass it."""
    folder = make_family("gemma3", tmp_path)
    for name, targets in (("both", ["q_proj"]), ("tower", r".*vision_tower.*q_proj")):
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        adapted = peft.get_peft_model(opened(folder), config).eval()
        adapted.save_pretrained(tmp_path / name)
        loaded = models.load(folder, dtype="float32")
        if name == "tower":
            with pytest.raises(AdapterError, match="adapts the vision_tower alone"):
                adapter.load(loaded, tmp_path / name)
            return
        adapter.load(loaded, tmp_path / name)
        assert "left out 1 layer of the vision_tower" in capsys.readouterr().err
        theirs = in_torch(adapted)
        assert max_diff(logits(loaded.model, TEXT), theirs) <= bound(theirs)


def test_a_layer_that_cannot_be_written_is_refused_before_it_trains(tmp_path: Path) -> None:
    folder = make_family("llama", tmp_path)
    loaded = models.load(folder, dtype="float32")
    names_of(loaded.model).tensors["model.layers.#.self_attn.q_proj.weight"] = ()
    unknown = r"model\.layers\.0\.self_attn\.q_proj: what its weight is made of"
    with pytest.raises(AdapterError, match=unknown):
        adapter.attach(loaded, methods.make("lora", {"rank": 2, "targets": "q_proj"}))
    assert adapter.layers(loaded.model) == {}
    adapter.attach(loaded, methods.make("lora", {"rank": 2, "targets": "k_proj"}))


def test_the_names_of_transformers_are_what_it_says_today() -> None:
    from torch_names import entry

    table = json.loads((Path(models.__file__).with_name("torch_names.json")).read_text())["names"]
    for family in ("qwen3_5", "mistral3", "mixtral", "lfm2_moe"):
        assert json.loads(json.dumps(entry(family)[1])) == table[family], family


def test_opened_is_the_class_that_peft_opens(tmp_path: Path) -> None:
    """The families' own check of `auto_class`: qwen3_5 is saved whole, and opened as its text."""
    folder = make_family("qwen3_5", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForConditionalGeneration"]
    for network in (opened(folder), auto_class(folder).from_pretrained(folder)):
        assert type(network).__name__ == "Qwen3_5ForCausalLM"
