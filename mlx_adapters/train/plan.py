"""How much memory and time a training run will take, from a few small steps before it starts.

The steps are of a few of the model's own blocks (see step_memory.py), so nothing is assumed about the
architecture, the method or the precision; what other depths and batches take is arithmetic. That is compared
with the peak of a real step, which was not used for it. The rows are random tokens of the longest length, so
the prediction is for the largest batch of the run.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_adapters import device, methods
from mlx_adapters.data.batches import rows_per_pass
from mlx_adapters.fields import current
from mlx_adapters.methods.base import Method
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.length import in_parts
from mlx_adapters.train.optimizers import COPIES
from mlx_adapters.train.step_memory import Bench, Pieces, row_length
from mlx_adapters.units import size

__all__ = [
    *("MemoryPlan", "Plan", "accuracy", "candidates", "cells", "command"),
    *("in_words", "overhead", "plan", "predict", "predict_all", "weigh"),
]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run with these settings takes, in bytes of arrays; the process itself comes on top.

    `weights` is the base model, `adapter` the trained arrays with their gradients and optimizer state, `peak`
    everything at the worst moment of a step; `measured` the peak that was seen on the way. `seconds` are
    those of a step. `error` is by how much the arithmetic was off for a real step of four blocks, 0.05 being
    5 % too much; None where it was not compared.
    """

    batch_size: int
    tokens: int
    gradient_checkpointing: bool
    weights: int
    adapter: int
    peak: int
    measured: int
    seconds: float = 0.0
    error: float | None = None


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
        return next(iter(self._ranked), None)

    @property
    def runner_up(self) -> Plan | None:
        """The next one that fits."""
        return next(iter(self._ranked[1:]), None)

    @property
    def _ranked(self) -> list[Plan]:
        fitting = filter(self.fits, self.plans)
        return sorted(fitting, key=lambda plan: (plan.gradient_checkpointing, -plan.batch_size))


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
    return weigh(list(predict_all(source, method=method, configs=configs, check=True)), memory)


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
    heads = ["batch size", "gradient checkpointing", "arrays at the peak", "with the process", "a step"]
    lines = [
        [
            str(one.batch_size),
            "yes" if one.gradient_checkpointing else "no",
            size(one.peak),
            size(one.peak + weighed.process),
            f"{one.seconds:.1f} s",
            "yes" if weighed.fits(one) else "NO",
        ]
        for one in weighed.plans
    ]
    return [*heads, f"fits {size(weighed.memory)}"], lines


def in_words(plan: Plan) -> str:
    """What a setting takes, in a line."""
    again = " with gradient checkpointing" if plan.gradient_checkpointing else ""
    return f"batch size {plan.batch_size}{again}: {size(plan.peak)}, {plan.seconds:.1f} s a step"


def accuracy(plans: Sequence[Plan]) -> str:
    """How far the arithmetic was off, in a sentence; empty where it was not compared."""
    errors = [abs(plan.error) for plan in plans if plan.error is not None]
    if not errors:
        return ""
    return f"The arithmetic was off by {max(errors):.0%} for a real step of four blocks."


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


def predict_all(
    source: str | Path, *, method: Method, configs: Sequence[TrainConfig], check: bool = False
) -> Iterator[Plan]:
    """`predict` for each of the settings, as soon as it is known. Those that differ in their batch size alone
    share the steps that are measured. With `check` each prediction says its error for a real step."""
    bench = Bench(source, method)
    found: dict[TrainConfig, Pieces] = {}
    for config in configs:
        alike = replace(config, batch_size=1)
        if alike not in found:
            rows = [_part(one) for one in configs if replace(one, batch_size=1) == alike]
            found[alike] = bench.measure(alike, rows, check=check)
        pieces, rows_at_once = found[alike], _part(config)
        passes = -(-config.batch_size // rows_at_once) * config.accumulation
        resident = bench.weights + _resident(bench.trained, passes)
        yield Plan(
            batch_size=config.batch_size,
            tokens=row_length(config),
            gradient_checkpointing=config.gradient_checkpointing,
            weights=bench.weights,
            adapter=bench.trained * COPIES,
            peak=resident + pieces.transient(rows_at_once, bench.depth),
            measured=bench.seen,
            seconds=passes * pieces.seconds(rows_at_once, bench.depth),
            error=pieces.error,
        )


def _resident(trained: int, passes: int) -> int:
    """Bytes of what trains and the optimizer's two moments, and of the sum of several passes' gradients."""
    return trained * (3 + (passes > 1))


def _part(config: TrainConfig) -> int:
    """The rows that are computed together: on a CPU those of a large batch never are."""
    if not in_parts(config):
        return config.batch_size
    return rows_per_pass(config.batch_size, row_length(config))


def overhead(plans: list[Plan]) -> int:
    """Bytes this process took besides MLX's arrays: Python, libraries, the allocator's slack."""
    return max(0, device.peak_memory() - max(plan.measured for plan in plans)) if device.on_cpu() else 0
