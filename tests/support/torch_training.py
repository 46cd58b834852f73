"""The steps of a training run taken by PyTorch, on the same batches."""

from typing import Any

import numpy as np
import torch

from mlx_adapters.data.tokens import Example
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run

CONFIG = TrainConfig(
    steps=20, batch_size=4, lr=5e-3, warmup=0, schedule="constant", weight_decay=0.01, no_decay=None
)


def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 20, 24)
    return [Example(list(map(int, rng.integers(4, 64, n))), int(n) // 3) for n in lengths]


def train_in_torch(
    network: Any, parameters: list[Any], run: Run, settings: TrainConfig = CONFIG
) -> list[float]:
    """The steps that `run` would take, with torch's AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    losses = []
    for _, batches in run.step_batches():
        ids, mask = together(batches)
        scores = network(input_ids=ids[:, :-1], attention_mask=torch.ones_like(ids[:, :-1])).logits
        scores = scores[:, -(ids.shape[1] - 1) :]
        each = torch.nn.functional.cross_entropy(scores.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (each * mask[:, 1:]).sum() / mask[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def together(batches: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of a batch as one, padded to the longest."""
    time = max(part.ids.shape[1] for part in batches)

    def joined(arrays: list[np.ndarray]) -> torch.Tensor:
        wide = [np.pad(array, ((0, 0), (0, time - array.shape[1]))) for array in arrays]
        return torch.tensor(np.concatenate(wide))

    return joined([np.array(part.ids) for part in batches]).long(), joined(
        [np.array(part.label_mask) for part in batches]
    )
