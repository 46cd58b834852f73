"""What a training step takes at any depth and number of rows, from three steps of a few of the model's
blocks.

The parts of a step's peak, besides the weights and the optimizer's state, which are counted:

    gradient(rows, blocks) = g(1, 2) + (rows - 1) (g(2, 2) - g(1, 2)) + (blocks - 2) (rows kept + trained)
    kept = (g(1, 6) - g(1, 2)) / 4 - trained,  of a block and row
    head(rows, blocks) = rows blocks kept + what the loss of so many labels takes

and the peak is the largest of them, and of what it takes to find the model's head. g(rows, blocks) is
measured with a head of few words instead of the model's own: otherwise that one hides the blocks where they
are few.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import is_
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_adapters import adapter, device
from mlx_adapters.adapter.call import call_model
from mlx_adapters.data.batches import Batch
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import UnsupportedError
from mlx_adapters.methods.base import Method
from mlx_adapters.models import load as model
from mlx_adapters.models.limits import vocabulary
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run
from mlx_adapters.train.loss import Head, loss_sum, split_head
from mlx_adapters.train.optimizers import kinds_of, make_optimizer
from mlx_adapters.train.step import make_update, train_step

__all__ = ["Bench", "Pieces", "row_length"]

_FEW, _CHECKED, _MORE = 2, 4, 6  # blocks; in four of them hybrids have each of their kinds
_WORDS = 1024  # of the small head
_AGAIN = (
    4 / 3
)  # of a block's time, with checkpointing: forward, and forward again with twice as much backward
_TOKENS = 256  # of a row, where nothing is said of its length


@dataclass(frozen=True)
class Pieces:
    """The measured parts of a step, in bytes and seconds; see above. `head` and `head_seconds` are by the
    number of rows; `error` is by how much they are off for a step of four blocks with the model's
    own head, which was not used for them."""

    gradient: int
    kept: float
    trained: float
    row: int
    probe: int
    block_seconds: float
    row_seconds: float
    blocks: int
    head: dict[int, int]
    head_seconds: dict[int, float]
    error: float | None = None

    def transient(self, rows: int, blocks: int) -> int:
        """Bytes at the worst moment of a step of so many rows, besides weights and optimizer state."""
        return max(self.probe, self.step(rows, blocks))

    def step(self, rows: int, blocks: int) -> int:
        """The same without what comes before the first step."""
        more = (blocks - self.blocks) * (rows * self.kept + self.trained)
        gradient = self.gradient + (rows - 1) * self.row + more
        return int(max(gradient, rows * blocks * self.kept + self.head.get(rows, 0)))

    def seconds(self, rows: int, blocks: int) -> float:
        """How long the gradient of so many rows takes."""
        block = self.block_seconds + (rows - 1) * self.row_seconds
        return blocks * block + self.head_seconds.get(rows, 0.0)


class Bench:
    """A model of which a few blocks are there, with the adapter; `seen` is MLX's peak on the way so far.

    Attributes:
        depth: blocks of the whole model.
        weights: bytes of the whole base model.
        trained: bytes of what trains on the whole model.
    """

    def __init__(self, source: str | Path, method: Method) -> None:
        whole = model.load(source, lazy=True)
        self.depth = len(whole.model.layers)
        self.weights = device.tree_bytes(whole.model.parameters())
        adapter.attach(whole, method)
        self.trained = device.tree_bytes(whole.model.trainable_parameters())
        self.network = whole.model
        self._holder, self._name, self._blocks = _list_of_blocks(self.network)
        self._cut(_MORE)
        self._blocks = self._blocks[:_MORE]
        mx.eval(self.network.parameters())
        self.words = vocabulary(self.network) or whole.config["vocab_size"]
        self.seen = 0
        before = self._start()
        self.head = split_head(self.network)
        self.probe = self._peak() - before
        self.small, self.width = self._small_head()
        self._seconds: dict[TrainConfig, tuple[float, float]] = {}
        self._heads: dict[tuple[int, int, str], tuple[int, float]] = {}

    def measure(self, config: TrainConfig, rows: Sequence[int], *, check: bool) -> Pieces:
        """Run the steps; `rows` are the numbers of rows of a pass that will be asked for."""
        self._cut(_MORE)
        most = max(rows)
        run = self._run(config, max(2, most))
        few, more = min(_FEW, self.depth), min(_MORE, self.depth)
        deep, deep_seconds = self._gradient(run, more, 1, self.small)
        above = self._trains()
        flat, seconds = self._gradient(run, few, 1, self.small)
        below = self._trains()
        wide, wide_seconds = self._gradient(run, few, 2, self.small) if most > 1 else (flat, seconds)
        trained, block = (above - below) / max(1, more - few), min(seconds / few, deep_seconds / more)
        row = min(block, max(0.0, wide_seconds / few - block))
        plain = replace(config, gradient_checkpointing=False)
        if plain in self._seconds:
            block, row = (_AGAIN * seconds for seconds in self._seconds[plain])
        elif plain == config:
            self._seconds[plain] = block, row
        heads = {count: self._loss(run, count) for count in dict.fromkeys(rows)} if self.head else {}
        pieces = Pieces(
            gradient=flat,
            kept=max(0.0, (deep - flat) / max(1, more - few) - trained),
            trained=trained,
            row=max(0, wide - flat),
            probe=self.probe,
            block_seconds=block,
            row_seconds=row,
            blocks=few,
            head={count: taken for count, (taken, _) in heads.items()},
            head_seconds={count: seconds for count, (_, seconds) in heads.items()},
        )
        if not check:
            return pieces
        count = min(_CHECKED, self.depth)
        start = self._gradient(run, count, most, self.head)[0]
        resident = device.tree_bytes(self.network.parameters()) + 2 * self._trains()
        return replace(pieces, error=(pieces.step(most, count) + resident) / (start + resident) - 1)

    def _trains(self) -> int:
        return device.tree_bytes(self.network.trainable_parameters())

    def _cut(self, blocks: int) -> None:
        """Leave only the first decoder blocks; the others' weights are never read."""
        self._holder[self._name] = self._blocks[:blocks]

    def _start(self) -> int:
        mx.reset_peak_memory()
        return mx.get_active_memory()

    def _peak(self) -> int:
        self.seen = max(self.seen, peak := mx.get_peak_memory())
        return peak

    def _run(self, config: TrainConfig, rows: int) -> Run:
        length = row_length(config)
        ids = np.random.default_rng(0).integers(0, min(self.words, _WORDS), (rows, length)).tolist()
        start = 1 if config.loss_on == "all" else length // 2
        once = replace(config, steps=1, warmup=0, validation=0, batch_size=rows, accumulation=1)
        return Run(self.network, [Example(row, start) for row in ids], config=once)

    def _batch(self, run: Run, rows: int) -> Batch:
        """The first `rows` rows of the run."""
        examples, config = run.examples, run.config
        run.examples, run.config = examples[:rows], replace(config, batch_size=rows)
        ((_, batches),) = run.step_batches()
        run.examples, run.config = examples, config
        return batches[0]

    def _gradient(self, run: Run, blocks: int, rows: int, head: Head | None) -> tuple[int, float]:
        """(bytes that a step takes beside weights and optimizer state, its seconds)."""
        self._cut(blocks)
        network, batch = self.network, self._batch(run, rows)
        trained = network.trainable_parameters()
        optimizer = make_optimizer(run.config, run.total, trained, None, kinds_of(network))
        update = make_update(optimizer, run.config.clip, compiled=run.compiles)
        gradient = run.gradient_fn(head, share=False)
        network.train()
        mx.eval(network.parameters(), optimizer.state)
        before, started = self._start(), time.perf_counter()
        train_step(network, optimizer, gradient, update, [batch])
        network.eval()
        return self._peak() - before, time.perf_counter() - started

    def _loss(self, run: Run, rows: int) -> tuple[int, float]:
        """The same of the loss alone, and its gradient with respect to the hidden states."""
        batch = self._batch(run, rows)
        key = (rows, batch.ids.size, run.config.loss_on)
        if key not in self._heads:
            hidden = mx.random.normal((*batch.ids[:, :-1].shape, self.width))
            mx.eval(hidden, list(batch.arrays.values()))

            def loss(hidden: mx.array) -> mx.array:
                assert self.head
                return loss_sum(self.network, batch, head=Head(lambda *_, **__: hidden, self.head.layer))

            before, started = self._start(), time.perf_counter()
            mx.eval(mx.value_and_grad(loss)(hidden))
            self._heads[key] = self._peak() - before, time.perf_counter() - started
        return self._heads[key]

    def _small_head(self) -> tuple[Head | None, int]:
        """(a head of few words in place of the model's own, its width); None where that one cannot be told
        apart."""
        if self.head is None:
            return None, 0
        hidden = call_model(self.network, mx.array([[1, 2, 3, 4]]), backbone=self.head.backbone)
        layer = nn.Linear(hidden.shape[-1], min(self.words, _WORDS), bias=False)
        layer.weight = layer.weight.astype(hidden.dtype)
        layer.freeze()
        mx.eval(layer.parameters())
        return Head(self.head.backbone, layer), hidden.shape[-1]


def row_length(config: TrainConfig) -> int:
    """Tokens of the rows that a step is measured with."""
    return config.max_length or _TOKENS


def _list_of_blocks(network: nn.Module) -> tuple[nn.Module, str, list[nn.Module]]:
    """(the module that holds the decoder blocks, under which name, the blocks)."""
    whole = list(network.layers)  # the model's own list, or a copy: that of a stage of its pipeline
    for module in network.modules():
        for name, value in module.items():
            if isinstance(value, list) and len(value) == len(whole) and all(map(is_, value, whole)):
                return module, name, whole
    raise UnsupportedError(
        f"{type(network).__name__}: its blocks cannot be cut, so memory cannot be predicted"
    )
