"""Data-parallel training: what the processes that `mlx.launch` started exchange.

Each process computes its rows of a batch. Losses and gradients are summed over all of them, in one message
per step.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_adapters.errors import TrainingError

__all__ = ["Processes", "processes"]


class Processes:
    """This process, number `rank` of the `size` that share the run; alone where nothing was launched."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank: int = group.rank() if group else 0
        self.size: int = group.size() if group else 1

    @property
    def writes(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def sums(self, numbers: Sequence[mx.array], tree: Any) -> tuple[list[mx.array], Any]:
        """The scalars and the arrays of the tree, each added up over all processes in float32."""
        if self.size == 1:
            return list(numbers), tree
        leaves = tree_flatten(tree)
        flat = [mx.stack([number.astype(mx.float32) for number in numbers])]
        flat += [array.astype(mx.float32).reshape(-1) for _, array in leaves]
        total = self._sum(mx.concatenate(flat))
        ends = [len(numbers)]
        for _, array in leaves:
            ends.append(ends[-1] + array.size)
        parts = mx.split(total, ends[:-1]) if leaves else [total]
        arrays = [
            (name, part.reshape(array.shape).astype(array.dtype))
            for (name, array), part in zip(leaves, parts[1:])
        ]
        return [parts[0][i] for i in range(len(numbers))], tree_unflatten(arrays) if arrays else tree

    def from_first(self, tree: Any) -> Any:
        """The tree as the first process has it; the others give arrays of the same shapes."""
        if self.size == 1:
            return tree
        leaves = sorted(
            tree_flatten(tree), key=lambda leaf: leaf[0]
        )  # a restored tree has another order than a new one
        sent = [(name, self._sum(a if self.writes else mx.zeros_like(a))) for name, a in leaves]
        mx.eval([array for _, array in sent])
        return tree_unflatten(sent)

    def agree(self, text: str, what: str) -> None:
        """Raise TrainingError in every process unless all give the same text."""
        if self.size == 1:
            return
        digest = int(hashlib.sha256(text.encode()).hexdigest()[:6], 16)  # exact in float32
        first = self._sum(mx.array([digest if self.writes else 0], dtype=mx.float32))
        same = mx.array([float(int(float(first)) == digest)])
        if int(float(self._sum(same))) != self.size:
            raise TrainingError(
                f"the {self.size} processes have different {what}: give all of them the same model, data "
                "and options"
            )

    def _sum(self, array: mx.array) -> mx.array:
        return mx.distributed.all_sum(array, group=self.group)


def processes() -> Processes:
    """The processes of this run, as `mlx.launch` set them up."""
    group = mx.distributed.init()
    return Processes(group if group.size() > 1 else None)
