"""The peak memory of real training steps, to compare predictions with."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_adapters import adapter
from mlx_adapters.data.tokens import Example
from mlx_adapters.methods.base import Method
from mlx_adapters.models import load as model
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run
from mlx_adapters.train.step_memory import row_length


def run_peak(folder: str | Path, method: Method, config: TrainConfig) -> int:
    """Peak bytes of training the whole model with rows of full length."""
    loaded = model.load(folder)
    adapter.attach(loaded, method)
    mx.eval(loaded.model.parameters())
    tokens = row_length(config)
    ids = np.random.default_rng(0).integers(0, 64, (config.batch_size, tokens)).tolist()
    start = 1 if config.loss_on == "all" else tokens // 2
    mx.reset_peak_memory()
    for _ in Run(loaded.model, [Example(row, start) for row in ids], config=config):
        pass
    return mx.get_peak_memory()
