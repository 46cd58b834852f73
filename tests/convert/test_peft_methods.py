"""DoRA, IA3, VeRA and LoRA beside PEFT where the matrix of test_methods.py does not look."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from adapted import IDS, attached, bound, logits
from cases import METHODS
from mlx.utils import tree_unflatten
from tiny import make_tiny
from transformers import AutoModelForCausalLM

from mlx_adapters import adapter
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.to_transformers import write_transformers
from mlx_adapters.errors import AdapterError
from mlx_adapters.methods.base import linear_like, plain_weight
from mlx_adapters.models import load as model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in MLX's format, and below it in PyTorch's."""
    root = tmp_path_factory.mktemp("models")
    convert(make_tiny("llama", root), root / "mlx")
    loaded = model.load(root / "mlx")
    write_transformers(loaded.model, loaded.config, root / "mlx" / "torch")
    return root / "mlx"


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder / "torch", dtype=torch.float32, attn_implementation="eager"
    )


def mask(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.float32) % 2 * 2


class Fixed(nn.Module):
    """A dropout that always drops the same half."""

    def __call__(self, x: mx.array) -> mx.array:
        return x * mx.array(mask(x.shape[-1]))


class TorchFixed(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return x * torch.tensor(mask(x.shape[-1]))


@pytest.mark.parametrize("case", ["lora", "dora", "vera"])
def test_dropout_drops_what_peft_drops(case: str, folder: Path, tmp_path: Path) -> None:
    """The same mask in both: DoRA's correction of the base sees the dropped input too."""
    from peft import PeftModel

    loaded, meta = attached(folder, METHODS[case], trained=True)
    adapter.save(loaded.model, tmp_path, meta=meta)
    whole = logits(loaded)
    for layer in adapter.layers(loaded.model).values():
        layer.dropout = Fixed()
    loaded.model.train()
    network = PeftModel.from_pretrained(base(folder), tmp_path, is_trainable=True).train()
    for module in network.modules():
        for name in ("lora_dropout", "vera_dropout"):
            if hasattr(module, name):
                getattr(module, name)["default"] = TorchFixed()
    with torch.no_grad():
        theirs = network(torch.tensor(IDS.tolist())).logits.numpy()
    np.testing.assert_allclose(logits(loaded), theirs, atol=bound(theirs))
    assert np.abs(whole - theirs).max() > 1e-2, "the negative control: without dropout it is another result"


@pytest.mark.parametrize("bits", [3, 5, 6])
@pytest.mark.parametrize("case", ["dora", "ia3-all", "vera", "lora-pissa"])
def test_bits_that_do_not_divide_a_word(case: str, bits: int, folder: Path, tmp_path: Path) -> None:
    """Their packed width says nothing of the input size; the written-out base gives the same."""
    convert(str(folder), tmp_path / "q", bits=bits, group_size=32)
    loaded, meta = attached(tmp_path / "q", METHODS[case], trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    dense = model.load(tmp_path / "q")
    quantized = [(p, m) for p, m in dense.model.named_modules() if isinstance(m, nn.QuantizedLinear)]
    dense.model.update_modules(tree_unflatten([(p, linear_like(m, plain_weight(m))) for p, m in quantized]))
    adapter.load(dense, tmp_path / "a")
    dense.model.eval()
    expected = logits(dense)
    np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected))
    merged = [(path, layer.merge()) for path, layer in adapter.layers(loaded.model).items()]
    loaded.model.update_modules(tree_unflatten(merged))
    np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected))


def test_feedforward_modules_may_be_a_pattern(folder: Path, tmp_path: Path) -> None:
    """o_proj is square: only the pattern says which side of it is scaled."""
    from peft import IA3Config, get_peft_model

    config = IA3Config(
        target_modules=r".*\.(k_proj|o_proj|down_proj)",
        feedforward_modules=r".*\.(o_proj|down_proj)",
        task_type="CAUSAL_LM",
    )
    network = get_peft_model(base(folder), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = network.eval()(torch.tensor(IDS.tolist())).logits.numpy()
    network.save_pretrained(tmp_path)
    loaded = model.load(folder)
    adapter.load(loaded, tmp_path)
    loaded.model.eval()
    np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected))


def test_shared_matrices_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    loaded, meta = attached(folder, METHODS["vera"], trained=True)
    adapter.save(loaded.model, tmp_path, meta=meta)
    arrays = adapter.read_tensors(tmp_path)
    cut = arrays | {"base_model.vera_A": arrays["base_model.vera_A"][:, :32]}
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), cut)
    with pytest.raises(AdapterError, match=r"vera_A \[8, 32\] is smaller than \[8, 64\]"):
        adapter.load(model.load(folder), tmp_path)
