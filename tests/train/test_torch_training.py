"""Twenty steps of training here and in PyTorch, from the same weights and on the same batches.

PEFT trains its own methods; those it lacks are trained through load_adapter.py's hooks.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from adapted import IDS, attached, bound, logits
from cases import METHODS, Method
from torch_training import CONFIG, examples, train_in_torch

from mlx_adapters import adapter, methods
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.convert import load_adapter, peft
from mlx_adapters.convert.against_torch import quiet_transformers
from mlx_adapters.data.tokens import Example
from mlx_adapters.models import load as model
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run


def base(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder / "torch", dtype=torch.float32, attn_implementation="eager"
    )


def in_peft(folder: Path, saved: Path, method: Method) -> tuple[Any, list[Any]]:
    """The fresh adapter as PEFT opens it, ready to train."""
    from peft import PeftConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file

    if methods.find(method.name).PEFT_TYPE in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"):
        config = PeftConfig.from_pretrained(saved)  # PEFT refuses to train a prompt it has loaded
        config.inference_mode, config.base_model_name_or_path = False, None
        network = get_peft_model(base(folder), config)
        with torch.no_grad():
            table = load_file(saved / "adapter_model.safetensors")["prompt_embeddings"]
            network.prompt_encoder["default"].embedding.weight.copy_(table)
    else:
        with quiet_transformers():  # PEFT warns of every norm
            network = PeftModel.from_pretrained(base(folder), saved, is_trainable=True)
    return network, [p for p in network.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "case", ["lora", "dora", "ia3", "vera", "ln_tuning", "prompt", "prefix", "series", "parallel", "seq_bn"]
)
@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "bloom"])
def test_losses_agree(
    case: str, arch: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHODS[case]
    loaded, meta = attached(folders[arch], method, trained=False)
    adapter.save(loaded.model, tmp_path, meta=meta)
    ours = [step.loss for step in Run(loaded.model, examples(), config=CONFIG)]
    if methods.find(method.name).IN_PEFT:
        network, parameters = in_peft(folders[arch], tmp_path, method)
    else:
        read = load_adapter.load_file
        held: dict[str, Any] = {}

        def trainable(file: Path) -> dict[str, Any]:
            held.update({name: tensor.requires_grad_() for name, tensor in read(file).items()})
            return dict(held)

        monkeypatch.setattr(load_adapter, "load_file", trainable)
        network = base(folders[arch]).requires_grad_(False)
        network = load_adapter.load_adapter(network, tmp_path)
        parameters = list(held.values())
    again = Run(attached(folders[arch], method, trained=False)[0].model, examples(), config=CONFIG)
    theirs = train_in_torch(network, parameters, again)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert len(ours) == 20
    assert np.mean(ours[12:18]) < np.mean(ours[:6]), "the third epoch is better than the first"


def test_an_adapter_of_peft_trains_on_here_and_goes_back(folders: dict[str, Path], tmp_path: Path) -> None:
    """Five steps in PEFT, five here, and PEFT opens the result."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    network = get_peft_model(base(folders["llama"]), config)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    ids = torch.tensor(IDS.tolist())
    for _ in range(5):
        loss = network(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = network.eval()(ids).logits.numpy()
    loaded = model.load(folders["llama"])
    meta = adapter.load(loaded, tmp_path / "theirs")
    loaded.model.eval()
    np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected))
    settings = TrainConfig(steps=5, batch_size=2, lr=1e-2, warmup=0)
    steps = list(Run(loaded.model, [Example(row, 1) for row in IDS.tolist()], config=settings))
    assert steps[-1].loss < steps[0].loss
    loaded.model.eval()
    assert np.abs(logits(loaded) - expected).max() > 1e-2
    adapter.save(loaded.model, tmp_path / "ours", meta=meta)
    peft.export(tmp_path / "ours", tmp_path / "back", base="owner/base")
    verdict = peft.verify(tmp_path / "back", folders["llama"])
    assert verdict.passed
    assert mx.array_equal(
        adapter.read_tensors(tmp_path / "ours")[next(iter(adapter.read_tensors(tmp_path / "ours")))],
        adapter.read_tensors(tmp_path / "back")[next(iter(adapter.read_tensors(tmp_path / "back")))],
    )


MATH = Path(__file__).parents[3] / "shared" / "data" / "train" / "math_data.json"


@pytest.mark.slow
@pytest.mark.skipif(not MATH.exists(), reason=f"no {MATH}")
def test_fifty_steps_of_a_real_model_on_real_data(smollm2: Path, tmp_path: Path) -> None:
    """LoRA on all linear layers of SmolLM2-135M, math_data, the same batches: every loss within 1e-3."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from mlx_adapters.data.sources import load_rows
    from mlx_adapters.data.tokens import encode

    settings = TrainConfig(steps=50, batch_size=2, lr=3e-4, warmup=0, schedule="constant", no_decay=None)
    chosen = methods.make("lora", {"rank": 8, "alpha": 16.0, "targets": "all-linear"})

    def prepared() -> tuple[model.LanguageModel, Run]:
        loaded = model.load(smollm2)
        items = encode(load_rows(str(MATH)), loaded.tokenizer, template="alpaca").examples[:400]
        items = [item.cut(256) for item in items]
        mx.random.seed(0)
        adapter.attach(loaded, chosen)
        return loaded, Run(loaded.model, items, config=settings)

    loaded, run = prepared()
    meta = AdapterMeta(method=chosen, base=model.describe(loaded))
    adapter.save(loaded.model, tmp_path, meta=meta)
    losses = [step.loss for step in run]
    network = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    network = PeftModel.from_pretrained(network, tmp_path, is_trainable=True)
    parameters = [p for p in network.parameters() if p.requires_grad]
    theirs = train_in_torch(network, parameters, prepared()[1], settings)
    apart = np.abs(np.subtract(losses, theirs))
    print(f"largest difference of 50 losses: {apart.max():.1e}; {losses[0]:.4f} -> {losses[-1]:.4f}")
    assert len(losses) == 50
    np.testing.assert_allclose(losses, theirs, atol=1e-3)
