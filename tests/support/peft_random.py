"""Random LoRA adapters, made by PEFT itself on a model of transformers."""

import random
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["drawn", "made"]


def drawn(rng: random.Random, network: Any) -> dict[str, Any]:
    """The fields of a random LoRA configuration for `network`: not every one is a configuration to PEFT."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in linear if re.search(r"(?<!vision_tower)\.layers\.\d+\.", name)]
    inside = [name for name in inside if "vision" not in name and "visual" not in name]
    ends = sorted({name.rpartition(".")[2] for name in inside})
    layers = sorted({int(re.search(r"layers\.(\d+)\.", name)[1]) for name in inside})  # type: ignore[index]
    some = rng.sample(ends, rng.randint(1, min(4, len(ends))))
    targets = rng.choice(
        [
            some,
            some,
            "all-linear",
            rng.sample(inside, rng.randint(1, min(6, len(inside)))),
            rf".*layers\.({'|'.join(map(str, rng.sample(layers, rng.randint(1, len(layers)))))})\..*"
            rf"({'|'.join(some)})",
        ]
    )
    fields: dict[str, Any] = {
        "r": rng.choice([1, 2, 3, 4, 8]),
        "lora_alpha": rng.choice([1, 4, 7, 16]),
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    extras: dict[str, Any] = {
        "use_rslora": True,
        "use_dora": True,
        "rank_pattern": {rng.choice(some): rng.choice([2, 5])},
        "alpha_pattern": {rng.choice(some): rng.choice([3, 9])},
        "modules_to_save": rng.sample(
            ["lm_head", "embed_tokens", "norm", rng.choice(ends)], rng.randint(1, 2)
        ),
        "bias": rng.choice(["all", "lora_only"]),
        "lora_dropout": 0.1,
        "init_lora_weights": "gaussian",
        "exclude_modules": [rng.choice(ends)],
        "trainable_token_indices": rng.sample(range(60), 3),
        "lora_bias": True,
        "ensure_weight_tying": True,
    }
    stacks = {".".join(name.split(".")[-2:]) for name, array in network.named_parameters() if array.ndim == 3}
    if stacks := {name for name in stacks if "conv" not in name}:  # of experts
        extras["target_parameters"] = rng.sample(sorted(stacks), rng.randint(1, len(stacks)))
    for name in rng.sample(sorted(extras), rng.choice([0, 1, 1, 2, 3])):
        fields[name] = extras[name]
    if isinstance(targets, list) and rng.random() < 0.25:
        fields["layers_to_transform"] = rng.sample(layers, rng.randint(1, len(layers)))
    return fields


def made(network: Any, fields: dict[str, Any], folder: Path, seed: int) -> Any | None:
    """The adapter on `network`, with random values and saved to `folder`; None where PEFT makes none."""
    import peft

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = peft.get_peft_model(network, peft.LoraConfig(**fields)).eval()
        except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError, RuntimeError):
            return None
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    size = 0.1 if "lora_" in name and "magnitude" not in name else 0.05
                    parameter.add_(torch.randn_like(parameter) * size)
        adapted.save_pretrained(folder)
    return adapted
