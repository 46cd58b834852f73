"""Every export opens in PEFT with nothing missing and nothing left over, or is refused by name.

On models of transformers' own without weights (the meta device), so that any architecture is quick to ask.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import samples
import torch
from safetensors.torch import load_file

from mlx_adapters import adapter, methods
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.convert import peft as export
from mlx_adapters.errors import AdapterError, AdaptersError

peft = pytest.importorskip("peft")
CASES = {
    "lora": {"rank": 2, "targets": "all-linear"},
    "dora": {"rank": 2, "targets": "all-linear"},
    "ia3": {"targets": "all-linear"},
    "vera": {"rank": 2, "targets": "all-linear"},
    "ln_tuning": {},
}
# names of the layers that must be refused, where not all do; None: nothing is refused
EXPECTED: dict[str, dict[str, str]] = {
    "gpt2": {},
    "gpt_bigcode": {},
    "mamba": {"lora": "out_proj", "dora": "out_proj"},
    # LoRA adapts a router as a parameter; the others need a module of PyTorch's own there
    **dict.fromkeys(("gpt_oss", "phimoe", "granitemoe"), dict.fromkeys(("dora", "ia3", "vera"), "router")),
    "minimax": dict.fromkeys(("dora", "ia3", "vera"), "gate") | {"ln_tuning": "k_norm"},
    "deepseek_v3": {"dora": "down_proj, gate_proj, up_proj"},
    "gemma3": dict.fromkeys(CASES, "norm|q_proj"),
    "exaone": dict.fromkeys(CASES, "ln_1|q_proj"),
    "stablelm": {},
}


def model_of_transformers(arch: str) -> Any:
    """A model of the sample's sizes; of its fields, those that the configuration of transformers has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(arch).to_dict()
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    given = {name: value for name, value in (samples.sample_config(arch) | ids).items() if name in known}
    given.pop("model_type")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **given))


def opened(folder: Path, arch: str) -> tuple[list[str], list[str]]:
    """(missing, left over) of the adapter's tensors in PEFT's model."""
    network = model_of_transformers(arch)
    base = {f"base_model.model.{name}" for name in network.state_dict()}
    config = peft.PeftConfig.from_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.device("meta"):
        wrapped = peft.get_peft_model(network, config)
    keys = peft.set_peft_model_state_dict(wrapped, tensors, low_cpu_mem_usage=True)
    own = {
        name
        for name, _ in wrapped.named_parameters()
        if name.replace(".base_layer", "").replace(".original_module", "") not in base
    }
    return sorted(own & set(keys.missing_keys or ())), list(keys.unexpected_keys)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What PEFT says of norms, patterns and stacked experts is not asked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def exported(arch: str, method: str, place: Path) -> Path:
    network, base = samples.sample(arch), samples.sample_config(arch)
    config = methods.make(method, CASES[method])
    adapter.attach(network, config, model_type=base["model_type"])
    meta = AdapterMeta(method=config, base=base)
    adapter.save(network, place / "a", meta=meta)
    export.export(place / "a", place / "p", base="owner/base")
    return place / "p"


@pytest.mark.parametrize("arch", EXPECTED)
def test_an_export_opens_or_is_refused_by_name(arch: str, tmp_path: Path) -> None:
    for method in CASES:
        if names := EXPECTED[arch].get(method):
            with pytest.raises(AdapterError, match=rf"PEFT opens no {method} on .*({names})"):
                exported(arch, method, tmp_path / method)
            assert not (tmp_path / method / "p").exists()
        else:
            assert opened(exported(arch, method, tmp_path / method), arch) == ([], []), method


# The sample has its kinds of blocks, or its sizes, otherwise than transformers reads them from its fields.
OTHERWISE = ("ernie4_5_moe", "gemma4_text", "kimi_linear", "llama4_text", "qwen3_next", "recurrent_gemma")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in samples.architectures() if arch not in OTHERWISE])
def test_so_does_that_of_every_other_architecture(arch: str, tmp_path: Path) -> None:
    try:
        model_of_transformers(arch)
        samples.sample(arch)
    except AdaptersError as error:
        pytest.skip(str(error))
    except Exception as error:  # transformers has no such model, or makes none of these sizes
        pytest.skip(f"{type(error).__name__}: {error}"[:100])
    wrong = {}
    for method in CASES:
        try:
            missing, left = opened(exported(arch, method, tmp_path / method), arch)
        except AdaptersError:
            continue
        except Exception as error:
            wrong[method] = f"{type(error).__name__}: {error}"[:200]
            continue
        if missing or left:
            wrong[method] = f"{len(missing)} missing {missing[:2]}, {len(left)} left over {left[:2]}"
    assert wrong == {}
