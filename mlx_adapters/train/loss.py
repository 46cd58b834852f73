"""Cross entropy over the supervised targets, with logits computed only where one is predicted.

The base is frozen, so nothing needs the logits of the other positions. The hidden states are picked before
the output head wherever the model is `head(backbone(ids))`; that is found out by comparing the two on a
short input, so a model with a twist in its head (soft-capping, a scale) takes the plain way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_adapters.data.batches import Batch
from mlx_adapters.virtual import forward

__all__ = ["Targets", "loss_sum", "split_head", "targets"]

Head = tuple[Callable[[mx.array], mx.array], Callable[[mx.array], mx.array]]

# Names of head twists: with small logits they hide below the comparison's tolerance.
_TWISTS = (
    "final_logit_softcapping",
    "final_logits_softcap",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
)
_MULTIPLE = 64


@dataclass(frozen=True)
class Targets:
    """A batch on the device: `ids` [rows, time], and per supervised target its flat position in
    `ids[:, :-1]`, the token `wanted` there, and a `weight` (0 for the padding to a round number)."""

    ids: mx.array
    positions: mx.array
    wanted: mx.array
    weight: mx.array
    count: int


def targets(batch: Batch) -> Targets:
    """Move a batch to the device. Their number is padded to a multiple: fewer shapes, fewer allocations."""
    rows, columns = np.nonzero(batch.mask)
    count = len(rows)
    padded = max(_MULTIPLE, -(-count // _MULTIPLE) * _MULTIPLE)
    positions, wanted = np.zeros(padded, np.int32), np.zeros(padded, np.int32)
    positions[:count] = rows * (batch.ids.shape[1] - 1) + columns - 1
    wanted[:count] = batch.ids[rows, columns]
    weight = (np.arange(padded) < count).astype(np.float32)
    return Targets(mx.array(batch.ids), mx.array(positions), mx.array(wanted), mx.array(weight), count)


def split_head(model: nn.Module) -> Head | None:
    """(backbone, head) with model(ids) == head(backbone(ids)), or None where the model is not built so."""
    backbone = getattr(model, "model", None)
    arguments = getattr(model, "args", None)
    if not callable(backbone) or any(getattr(arguments, name, None) for name in _TWISTS):
        return None
    probe = mx.array([[1, 2, 3, 4]])
    expected = model(probe)
    hidden = backbone(probe)
    if not isinstance(hidden, mx.array) or hidden.shape[:2] != probe.shape:
        return None
    for head in _heads(model, backbone):
        try:
            logits = head(hidden)
        except ValueError:
            continue
        if logits.shape == expected.shape:
            scale = mx.abs(expected).max()
            if (mx.abs(logits - expected).max() <= 1e-5 * scale).item():
                return backbone, head
    return None


def loss_sum(model: nn.Module, batch: Targets, *, head: Head | None) -> mx.array:
    """Summed cross entropy (natural logarithm, float32) of the batch's targets; 0 where it has none."""
    inputs = batch.ids[:, :-1]
    if head is not None:
        backbone, project = head
        hidden = forward(model, inputs, backbone=backbone)
        logits = project(hidden.reshape(-1, hidden.shape[-1])[batch.positions])
    else:
        logits = forward(model, inputs)
        logits = logits.reshape(-1, logits.shape[-1])[batch.positions]
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), batch.wanted)
    return (losses * batch.weight).sum()


def _heads(model: nn.Module, backbone: Any) -> list[Callable[[mx.array], mx.array]]:
    found = [getattr(model, name) for name in ("lm_head", "embed_out") if hasattr(model, name)]
    for name in ("embed_tokens", "wte", "embed_in"):
        if hasattr(backbone, name):
            found.append(getattr(backbone, name).as_linear)
    return found
