"""Cross entropy over the supervised targets, with logits computed only where one is predicted.

The base is frozen, so nothing needs the logits of the other positions. The hidden states are picked before
the output head wherever the model is `head(backbone(ids))`; that is found out by comparing the two on a
short input, so a model with a twist in its head (soft-capping, a scale) takes the plain way.

Where the head is a frozen linear layer, the gradient with respect to the hidden state is formed with the
loss, chunk by chunk: nothing of the size tokens x vocabulary is kept for the backward pass.

    p = softmax(h W^T),  loss = sum_i w_i (-log p_i[y_i]),  d loss / d h_i = w_i (p_i W - W[y_i])
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_adapters import backend, exponential
from mlx_adapters.data.batches import Batch
from mlx_adapters.quantized import dequantize
from mlx_adapters.virtual import forward

__all__ = ["Head", "Targets", "loss_sum", "split_head", "targets"]

# Names of head twists: with small logits they hide below the comparison's tolerance.
_TWISTS = (
    "final_logit_softcapping",
    "final_logits_softcap",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
)
_MULTIPLE = 64
# Targets a chunk: with 49k words its logits take 25 MB, which malloc keeps for the next chunk (above 32 MB
# glibc gives them back, and the page faults cost more than larger products gain).
_CHUNK = 128
_LINEAR = (nn.Linear, nn.QuantizedLinear)
_EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class Head:
    """`backbone(ids)` gives hidden states, `layer` turns them into logits: a linear layer or a tied
    embedding."""

    backbone: Callable[..., mx.array]
    layer: nn.Module

    def project(self, hidden: mx.array) -> mx.array:
        """Logits [n, vocabulary] of hidden states [n, width]."""
        as_linear = getattr(self.layer, "as_linear", None)
        logits: mx.array = (as_linear or self.layer)(hidden)
        return logits

    @property
    def frozen(self) -> bool:
        """Whether the layer is a plain one that nothing trains: then its gradient has a closed form."""
        return isinstance(self.layer, _LINEAR + _EMBEDDING) and not self.layer.trainable_parameters()


@dataclass(frozen=True)
class Targets:
    """A batch on the device: `ids` [rows, time], and per supervised target its flat position in
    `ids[:, :-1]`, the token `wanted` there, and a `weight` (0 for the padding to a round number)."""

    ids: mx.array
    positions: mx.array
    wanted: mx.array
    weight: mx.array


def targets(batch: Batch) -> Targets:
    """Move a batch to the device. Their number is padded to a multiple: fewer shapes, fewer allocations."""
    rows, columns = np.nonzero(batch.mask)
    count = len(rows)
    padded = max(_MULTIPLE, -(-count // _MULTIPLE) * _MULTIPLE)
    positions, wanted = np.zeros(padded, np.int32), np.zeros(padded, np.int32)
    positions[:count] = rows * (batch.ids.shape[1] - 1) + columns - 1
    wanted[:count] = batch.ids[rows, columns]
    weight = np.zeros(padded, np.float32)
    weight[:count] = batch.mask[rows, columns]
    return Targets(mx.array(batch.ids), mx.array(positions), mx.array(wanted), mx.array(weight))


def split_head(model: nn.Module) -> Head | None:
    """The head with model(ids) == head(backbone(ids)), or None where the model is not built so."""
    backbone = getattr(model, "model", None)
    arguments = getattr(model, "args", None)
    if not callable(backbone) or any(getattr(arguments, name, None) for name in _TWISTS):
        return None
    probe = mx.array([[1, 2, 3, 4]])
    expected = model(probe)
    hidden = backbone(probe)
    if not isinstance(hidden, mx.array) or hidden.shape[:2] != probe.shape:
        return None
    for layer in _heads(model, backbone):
        head = Head(backbone, layer)
        try:
            logits = head.project(hidden)
        except (ValueError, AttributeError):
            continue
        if logits.shape == expected.shape:
            scale = mx.abs(expected).max()
            if (mx.abs(logits - expected).max() <= 1e-5 * scale).item():
                return head
    return None


def loss_sum(
    model: nn.Module,
    batch: Targets,
    *,
    head: Head | None,
    gradient: bool = True,
    compiled: bool = False,
    cache: list[Any] | None = None,
) -> mx.array:
    """Summed cross entropy (natural logarithm, float32) of the batch's targets; 0 where it has none.

    Without `gradient` the value alone is computed, in less time. `compiled` says that this is traced for
    `mx.compile`. `cache` is what the model is called with.
    """
    inputs = batch.ids[:, :-1]
    if head is None:
        logits = forward(model, inputs, cache=cache)
        return _cross_entropy(logits.reshape(-1, logits.shape[-1])[batch.positions], batch)
    hidden = forward(model, inputs, backbone=head.backbone, cache=cache)
    hidden = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    if not head.frozen:
        return _cross_entropy(head.project(hidden), batch)
    if not gradient:
        return _chunked(hidden, batch, _Frozen(head, hidden), gradient=False)[0]

    @mx.custom_function
    def fused(hidden: mx.array) -> tuple[mx.array, mx.array]:
        return _chunked(hidden, batch, _Frozen(head, hidden), gradient=True, compiled=compiled)

    @fused.vjp
    def pull(primals: Any, cotangents: Any, outputs: Any) -> mx.array:
        slope: mx.array = outputs[1]
        return (cotangents[0] * slope).astype(primals.dtype)

    value: mx.array = fused(hidden)[0]  # type: ignore[index]
    return value


def _cross_entropy(logits: mx.array, batch: Targets) -> mx.array:
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), batch.wanted)
    return (losses * batch.weight).sum()


def _chunked(
    hidden: mx.array, batch: Targets, head: "_Frozen", *, gradient: bool, compiled: bool = False
) -> tuple[mx.array, mx.array]:
    """(loss, its gradient with respect to `hidden`), one chunk after the other."""
    total, slopes = mx.array(0.0), []
    done: mx.array = total
    for first in range(0, hidden.shape[0], _CHUNK):
        part = slice(first, first + _CHUNK)
        # the dependency makes a chunk wait for the one before: else all their logits are alive together
        states = mx.depends([hidden[part]], [done])[0]
        wanted, weight = batch.wanted[part], batch.weight[part]
        logits = head.project(states).astype(mx.float32)
        chosen = mx.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        if not gradient:
            done = total = total + ((mx.logsumexp(logits, axis=-1) - chosen) * weight).sum()
            continue
        most = logits.max(axis=-1, keepdims=True)
        if compiled and backend.on_cpu():  # one pass over the logits; not compiled it would be a dozen
            p = exponential.exp(logits - most)
            z = p.sum(axis=-1, keepdims=True)
            expected = head.times(p) / z
        else:  # one exponential a logit: the largest probability is never tiny and gives the sum back
            p = mx.softmax(logits, axis=-1, precise=True)
            z = 1.0 / p.max(axis=-1, keepdims=True)
            expected = head.times(p)
        total = total + (((most + mx.log(z))[:, 0] - chosen) * weight).sum()
        done = (expected - head.rows(wanted)) * weight[:, None]
        slopes.append(done)
    return total, mx.concatenate(slopes) if slopes else mx.zeros_like(hidden)


class _Frozen:
    """Products with the weight W [vocabulary, width] of a head that does not train.

    On a CPU a quantized W is written out once for all chunks; Metal has kernels for the packed one.
    """

    def __init__(self, head: Head, hidden: mx.array) -> None:
        self.layer, self._project = head.layer, head.project
        packed = isinstance(self.layer, (nn.QuantizedLinear, nn.QuantizedEmbedding))
        self.weight: mx.array | None = None if packed else self.layer.weight
        if packed and backend.on_cpu():
            self.weight = dequantize(self.layer, after=hidden)

    def project(self, hidden: mx.array) -> mx.array:
        """Logits: h W^T + bias."""
        if self.weight is None:
            return self._project(hidden)
        logits = hidden @ self.weight.T
        return logits + self.layer.bias if "bias" in self.layer else logits

    def times(self, p: mx.array) -> mx.array:
        """p W in float32."""
        if self.weight is not None:
            return (p.astype(self.weight.dtype) @ self.weight).astype(mx.float32)
        layer = self.layer
        return mx.quantized_matmul(
            p.astype(layer.scales.dtype),
            layer.weight,
            layer.scales,
            layer.get("biases"),
            transpose=False,
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
        ).astype(mx.float32)

    def rows(self, wanted: mx.array) -> mx.array:
        """W[wanted] in float32."""
        if self.weight is not None:
            return self.weight[wanted].astype(mx.float32)
        layer = self.layer
        biases = layer.get("biases")
        return mx.dequantize(
            layer.weight[wanted],
            layer.scales[wanted],
            None if biases is None else biases[wanted],
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
        ).astype(mx.float32)


def _heads(model: nn.Module, backbone: Any) -> list[nn.Module]:
    found = [getattr(model, name) for name in ("lm_head", "embed_out") if hasattr(model, name)]
    found += [
        getattr(backbone, name)
        for name in ("lm_head", "embed_out", "output_layer")
        if hasattr(backbone, name)
    ]
    for name in ("embed_tokens", "wte", "embed_in", "word_embeddings"):
        if hasattr(backbone, name):
            found.append(getattr(backbone, name))
    return found
