"""How much memory a training run will take, measured on a few of the model's own blocks before it starts.

Peak memory grows by the same amount with every block. So one step is run on the model cut to four and to six
blocks, with rows of the full length, and the line through the two peaks is read at the real depth:

    peak(blocks) = peak(4) + (blocks - 4) * (peak(6) - peak(4)) / 2

Nothing is assumed about the architecture, the method or the precision. The rows are random tokens of the
longest length, so the prediction is for the largest batch of the run.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import is_
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_adapters import adapter, device, methods
from mlx_adapters.data.batches import rows_per_pass
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import UnsupportedError
from mlx_adapters.fields import current
from mlx_adapters.methods.base import Method
from mlx_adapters.models import load as model
from mlx_adapters.models.limits import vocabulary
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run
from mlx_adapters.units import size

__all__ = [
    *("MemoryPlan", "Plan", "candidates", "cells", "command"),
    *("overhead", "plan", "predict", "predict_all", "weigh"),
]

_SHORT, _LONG = 4, 6
_TOKENS = 256  # of a row, where nothing is said of its length
_COPIES = 4  # a trained array, its gradient, and the optimizer's two moments


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run with these settings takes, in bytes of arrays; the process itself comes on top.

    `weights` is the base model, `adapter` the trained arrays with their gradients and optimizer state, `peak`
    everything at the worst moment of a step; `measured` the peak that was seen on the way.
    """

    batch_size: int
    tokens: int
    gradient_checkpointing: bool
    weights: int
    adapter: int
    peak: int
    measured: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Which settings fit into `memory` bytes; the `process` itself takes so many besides MLX's arrays."""

    memory: int
    process: int
    plans: list[Plan]

    def fits(self, plan: Plan) -> bool:
        """Whether a run with these settings stays within the memory."""
        return plan.peak + self.process <= self.memory

    @property
    def best(self) -> Plan | None:
        """The fastest that fits: computing blocks again costs more than small batches do."""
        fitting = filter(self.fits, self.plans)
        return max(fitting, key=lambda plan: (not plan.gradient_checkpointing, plan.batch_size), default=None)


def plan(
    source: str | Path,
    method: Method | str = "lora",
    *,
    batch_sizes: Sequence[int] = (1, 2, 4, 8),
    memory: int | None = None,
    **options: Any,
) -> MemoryPlan:
    """Predict the memory of training with several batch sizes, with gradient checkpointing and without.

    Args:
        source: a model folder or hub id.
        method: the method with its options, as `LoRA(rank=16)`, or its name.
        batch_sizes: the batch sizes to try.
        memory: bytes of the machine; by default of this one.
        **options: other fields of `TrainConfig`; `max_length` is the length of the rows, by default 256.

    Returns:
        A prediction for each of the settings, and which of them fit.
    """
    method = methods.make(method, {}) if isinstance(method, str) else method
    configs = candidates(batch_sizes, **options)
    return weigh(list(predict_all(source, method=method, configs=configs)), memory)


def candidates(batch_sizes: Sequence[int], **options: Any) -> list[TrainConfig]:
    """Every batch size, without gradient checkpointing and with it."""
    return [
        TrainConfig(batch_size=size, gradient_checkpointing=again, **current(TrainConfig, options))
        for again in (False, True)
        for size in batch_sizes
    ]


def weigh(plans: list[Plan], memory: int | None = None) -> MemoryPlan:
    """The predictions of this process against `memory` bytes, by default those of this machine."""
    memory = device.total_memory() if memory is None else memory
    return MemoryPlan(memory=memory, process=overhead(plans), plans=plans)


def cells(weighed: MemoryPlan) -> tuple[list[str], list[list[str]]]:
    """(heads, lines) of a table of the predictions."""
    heads = ["batch size", "gradient checkpointing", "arrays at the peak", "with the process"]
    lines = [
        [
            str(one.batch_size),
            "yes" if one.gradient_checkpointing else "no",
            size(one.peak),
            size(one.peak + weighed.process),
            "yes" if weighed.fits(one) else "NO",
        ]
        for one in weighed.plans
    ]
    return [*heads, f"fits {size(weighed.memory)}"], lines


def command(source: str, plan: Plan, *, method: str, fields: Sequence[str], loss_on: str) -> str:
    """The command that trains as planned; what is the default is left out. `fields` are `name=value`."""
    words = ["mlx-adapters", "train", source, "--data", "my.jsonl", "--output", "my-adapter"]
    words += ["--batch-size", str(plan.batch_size), "--max-length", str(plan.tokens)]
    words += ["--gradient-checkpointing"] if plan.gradient_checkpointing else []
    words += [] if method == "lora" else ["--method", method]
    words += [word for field in fields for word in ("--set", field)]
    words += [] if loss_on == "completion" else ["--loss-on", loss_on]
    return shlex.join(words)


def predict(source: str | Path, *, method: Method, config: TrainConfig) -> Plan:
    """The memory of training `method` on the model in `source` with `config`.

    `config.max_length` is the length of the rows, by default 256. Raises what loading and attaching raise,
    and UnsupportedError for a model whose blocks cannot be cut.
    """
    return next(predict_all(source, method=method, configs=[config]))


def predict_all(source: str | Path, *, method: Method, configs: Sequence[TrainConfig]) -> Iterator[Plan]:
    """`predict` for each of the settings. Those whose batches are computed in parts of the same size are
    measured once: on a CPU a larger batch takes more time, and no more memory."""
    whole = model.load(source, lazy=True)
    depth, weights = len(whole.model.layers), _bytes(whole.model.parameters())
    adapter.attach(whole, method)
    trained = _bytes(whole.model.trainable_parameters())
    del whole
    blocks = list(dict.fromkeys((min(_SHORT, depth), min(_LONG, depth))))
    found: dict[TrainConfig, list[int]] = {}
    for config in configs:
        measured = _smallest(config, configs)
        if measured not in found:
            found[measured] = [_peak(source, method, measured, count) for count in blocks]
        peaks = found[measured]
        growth = (peaks[-1] - peaks[0]) / max(1, blocks[-1] - blocks[0])
        yield Plan(
            batch_size=config.batch_size,
            tokens=_tokens(config),
            gradient_checkpointing=config.gradient_checkpointing,
            weights=weights,
            adapter=trained * _COPIES,
            peak=peaks[0] + int((depth - blocks[0]) * growth),
            measured=max(peaks),
        )


def _smallest(config: TrainConfig, configs: Sequence[TrainConfig]) -> TrainConfig:
    """The smallest batch among `configs` that takes as much memory as that of `config`: one of two parts or
    more, whose gradients are added up, where there is one."""
    if not device.on_cpu():
        return config
    alike = [one for one in configs if replace(one, batch_size=config.batch_size) == config]
    alike = [one for one in alike if _part(one) == _part(config)]
    several = [one for one in alike if one.batch_size > _part(one)]
    return min(several or alike, key=lambda one: one.batch_size)


def _tokens(config: TrainConfig) -> int:
    return config.max_length or _TOKENS


def _part(config: TrainConfig) -> int:
    return rows_per_pass(config.batch_size, _tokens(config))


def overhead(plans: list[Plan]) -> int:
    """Bytes this process took besides MLX's arrays: Python, libraries, the allocator's slack."""
    return max(0, device.peak_memory() - max(plan.measured for plan in plans)) if device.on_cpu() else 0


def _peak(source: str | Path, method: Method, config: TrainConfig, blocks: int) -> int:
    """Peak bytes of a training step on the model cut to its first `blocks` blocks."""
    loaded = model.load(source, lazy=True)
    _cut(loaded.model, blocks)
    adapter.attach(loaded, method)
    words = vocabulary(loaded.model) or loaded.config["vocab_size"]
    rows = np.random.default_rng(0).integers(0, words, (config.batch_size, _tokens(config)))
    start = 1 if config.loss_on == "all" else _tokens(config) // 2
    once = replace(config, steps=1, warmup=0, validation=0)
    run = Run(loaded.model, [Example(row, start) for row in rows.tolist()], config=once)
    # there in every step but the first, whose peak is that of all others then
    mx.eval(loaded.model.trainable_parameters(), run.optimizer.state)
    mx.reset_peak_memory()
    for _ in run:
        pass
    return mx.get_peak_memory()


def _cut(network: nn.Module, blocks: int) -> None:
    """Leave only the first `blocks` decoder blocks; the others' weights are never read."""
    whole = list(network.layers)  # the model's own list, or a copy: that of a stage of its pipeline
    for module in network.modules():
        for name, value in module.items():
            if isinstance(value, list) and len(value) == len(whole) and all(map(is_, value, whole)):
                module[name] = whole[:blocks]
                return
    raise UnsupportedError(
        f"{type(network).__name__}: its blocks cannot be cut, so memory cannot be predicted"
    )


def _bytes(tree: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tree))
