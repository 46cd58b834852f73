"""A random two-layer llama, rows and settings for a training run of seconds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from cases import METHODS
from mlx.utils import tree_flatten, tree_unflatten
from tiny import random_llama

from mlx_adapters import adapter, methods
from mlx_adapters.data.tokens import Example
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.trainer import Trainer


def tiny(*, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """A random two-layer llama with LoRA on it."""
    mx.random.seed(seed)
    model = random_llama()
    config = methods.make("lora", {"rank": 4, "dropout": dropout})
    adapter.attach(model, config)
    mx.eval(model.parameters())
    return model


def examples(count: int = 20, *, seed: int = 0) -> list[Example]:
    """Random prompts of 3 to 12 tokens, each answered by its first token, repeated."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt = [int(token) for token in rng.integers(3, 48, size=int(rng.integers(3, 13)))]
        made.append(Example([*prompt, prompt[0], prompt[0], 2], len(prompt)))
    return made


def flat(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(model.trainable_parameters())}


def config(**fields: Any) -> TrainConfig:
    return TrainConfig(**({"batch_size": 4, "lr": 1e-2, "warmup": 2, "steps": 6} | fields))


def llama_with(case: str) -> Any:
    """A random three-layer llama with the method of a row of METHODS, moved away from its start."""
    mx.random.seed(0)
    model = random_llama(num_hidden_layers=3)
    fields = dict(METHODS[case].fields)
    config = methods.make(METHODS[case].name, fields)
    adapter.attach(model, config)
    for path, array in tree_flatten(model.trainable_parameters()):
        moved = array + 0.1 * mx.random.normal(array.shape)
        model.update(tree_unflatten([(path, moved)]), strict=False)
    mx.eval(model.parameters())
    model.train()
    return model


# the rows of METHODS that need no model folder
CASES = [case for case, method in METHODS.items() if "llama" not in method.refused and method.prepare is None]


def jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write `rows` to `file`, one object per line; its folder is made."""
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def losses(trainer: Trainer, stop: int = 0) -> list[float]:
    """The losses of a run to its end, or to step `stop`; the adapter is off the model afterwards."""
    found = []
    for step in trainer:
        found.append(step.loss)
        if step.step == stop:
            break
    trainer.detach()
    return found
