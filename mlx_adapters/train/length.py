"""How long a run is: its epochs, its steps, and how many of them are warm-up."""

import math
from collections.abc import Sequence

from mlx_adapters import device
from mlx_adapters.data.batches import groups
from mlx_adapters.data.tokens import Example
from mlx_adapters.train.config import TrainConfig

__all__ = ["EPOCHS", "LEAST_STEPS", "epoch_groups", "epochs", "in_parts", "total_steps", "warmup_steps"]

EPOCHS = 3  # the paper's, for its thousands of rows
# Steps of a run whose length nobody chose. Eight rows make three steps in three epochs, and learn nothing; at
# LoRA's default rate SmolLM2-135M's loss on them fell from 4.8 to 3.4 in 20 steps, and to 0.9 in 60.
LEAST_STEPS = 50
_WARMUP = 10


def in_parts(config: TrainConfig) -> bool:
    """Whether a batch is computed a few rows at a time, so that a larger one takes no more memory: on a CPU,
    unless the balance of experts is learned, which is a property of the whole batch."""
    return device.on_cpu() and not config.router_aux_loss


def epochs(examples: Sequence[Example], config: TrainConfig, processes: int = 1) -> int:
    """How often the run goes through its examples. Unless that was chosen, three times, and as often as it
    takes to make some steps of a few rows."""
    if config.epochs is not None:
        return config.epochs
    each = _steps_of_epoch(examples, config, processes, 0)
    return max(EPOCHS, math.ceil(LEAST_STEPS / each))


def total_steps(examples: Sequence[Example], config: TrainConfig, processes: int = 1) -> int:
    """How many optimizer steps the run has."""
    if config.steps:
        return config.steps
    count = epochs(examples, config, processes)
    if not config.packing:  # every epoch has as many
        return count * _steps_of_epoch(examples, config, processes, 0)
    return sum(_steps_of_epoch(examples, config, processes, epoch) for epoch in range(count))


def warmup_steps(config: TrainConfig, total: int) -> int:
    """How many steps the rate rises: as chosen, else at most a tenth of them."""
    return min(_WARMUP, total // 10) if config.warmup is None else min(config.warmup, total)


def epoch_groups(
    examples: Sequence[Example], config: TrainConfig, processes: int, epoch: int
) -> Sequence[list[list[int]]]:
    """The batches of an epoch, of all processes: rows, each the examples it holds."""
    return groups(
        examples,
        batch_size=config.batch_size * processes,
        seed=config.seed,
        epoch=epoch,
        pack=config.max_length if config.packing else None,
    )


def _steps_of_epoch(examples: Sequence[Example], config: TrainConfig, processes: int, epoch: int) -> int:
    if config.packing:
        batches = len(epoch_groups(examples, config, processes, epoch))
    else:
        batches = math.ceil(len(examples) / (config.batch_size * processes))
    return math.ceil(batches / config.accumulation)
