"""Cross entropy over the supervised targets, with logits computed only where one is predicted.

The base is frozen, so nothing needs the logits of the other positions. The hidden states are picked before
the output head wherever the model is `head(backbone(ids))`; that is found out by comparing the two on a
short input, so a model with a twist in its head (soft-capping, a scale) takes the plain way.

Where the head is a frozen linear layer, the gradient with respect to the hidden state is formed with the
loss, one part of the vocabulary after the other: nothing of the size tokens x vocabulary is ever there.

    p = softmax(h W^T),  loss = sum_i w_i (-log p_i[y_i]),  d loss / d h_i = w_i (p_i W - W[y_i])

As in attention over the words (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867): the sums of e^l
and of e^l W go on from part to part, scaled down where a larger logit l comes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_adapters import device
from mlx_adapters.adapter.call import apart, call_model
from mlx_adapters.cpu import exponential
from mlx_adapters.cpu.quantized import dequantize
from mlx_adapters.data.batches import Batch
from mlx_adapters.models import sites

__all__ = ["Head", "Targets", "loss_sum", "split_head", "targets"]

_MULTIPLE = 64
# Logits of a part of the vocabulary. On a CPU a few arrays of so many stay in the cache; a GPU wants products
# that are larger.
_LOGITS = {"cpu": 1 << 21, "gpu": 1 << 24}
_WORDS = 1024  # a part has a multiple of so many words
_LINEAR = (nn.Linear, nn.QuantizedLinear)
_EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
_PACKED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


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
    # a small twist in the head can hide below the comparison's tolerance
    if not callable(backbone) or sites.twisted_head(model):
        return None
    probe = mx.array([[1, 2, 3, 4]])
    expected = call_model(model, probe)
    try:
        hidden = call_model(model, probe, backbone=backbone)
    except TypeError:  # it wants more than token ids and a cache
        return None
    if not isinstance(hidden, mx.array) or hidden.shape[:2] != probe.shape:
        return None
    for layer in _heads(model, backbone):
        head = Head(backbone, layer)
        try:
            logits = head.project(hidden)
        except (ValueError, AttributeError):
            continue
        if logits.shape == expected.shape and apart(logits, expected) <= 1e-5:
            return head
    return None


def loss_sum(
    model: nn.Module,
    batch: Targets,
    *,
    head: Head | None,
    gradient: bool = True,
    cache: list[Any] | None = None,
) -> mx.array:
    """Summed cross entropy (natural logarithm, float32) of the batch's targets; 0 where it has none.

    Without `gradient` the value alone is computed, in less time. `cache` is what the model is called with.
    """
    inputs = batch.ids[:, :-1]
    if head is None:
        logits = call_model(model, inputs, cache=cache)
        return _cross_entropy(logits.reshape(-1, logits.shape[-1])[batch.positions], batch)
    hidden = call_model(model, inputs, backbone=head.backbone, cache=cache)
    hidden = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    if not head.frozen:
        return _cross_entropy(head.project(hidden), batch)
    if not gradient:
        return _by_words(hidden, batch, head.layer, gradient=False)[0]

    @mx.custom_function
    def fused(hidden: mx.array) -> tuple[mx.array, mx.array]:
        return _by_words(hidden, batch, head.layer, gradient=True)

    @fused.vjp
    def pull(primals: Any, cotangents: Any, outputs: Any) -> mx.array:
        slope: mx.array = outputs[1]
        return (cotangents[0] * slope).astype(primals.dtype)

    value: mx.array = fused(hidden)[0]  # type: ignore[index]
    return value


def _cross_entropy(logits: mx.array, batch: Targets) -> mx.array:
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), batch.wanted)
    return (losses * batch.weight).sum()


def _by_words(
    hidden: mx.array, batch: Targets, layer: nn.Module, *, gradient: bool
) -> tuple[mx.array, mx.array]:
    """(loss, its gradient with respect to `hidden`), one part of the vocabulary after the other."""
    count, vocabulary = hidden.shape[0], layer.weight.shape[0]
    kind = "cpu" if device.on_cpu() else "gpu"
    words = max(1, _LOGITS[kind] // (max(1, count) * _WORDS)) * _WORDS
    most = mx.full((count, 1), -math.inf)
    chosen, z = mx.zeros((count,)), mx.zeros((count, 1))
    expected = mx.zeros(hidden.shape)
    done = z
    for first in range(0, vocabulary, words):
        # the dependency makes a part wait for the one before: else the logits of all are alive together
        states = mx.depends([hidden], [done])[0]
        part = _Words(layer, slice(first, first + words), after=states)
        logits = part.logits(states).astype(mx.float32)
        place = batch.wanted - first
        inside = (place >= 0) & (place < logits.shape[1])
        place = mx.clip(place, 0, logits.shape[1] - 1)
        chosen = chosen + mx.where(inside, mx.take_along_axis(logits, place[:, None], axis=-1)[:, 0], 0.0)
        before, most = most, mx.maximum(most, logits.max(axis=-1, keepdims=True))
        p = exponential.shifted_exp(logits, most) if kind == "cpu" else mx.exp(logits - most)
        less = mx.exp(before - most)
        done = z = z * less + p.sum(axis=-1, keepdims=True)
        if gradient:
            done = expected = expected * less + part.times(p)
    loss = (((most + mx.log(z))[:, 0] - chosen) * batch.weight).sum()
    if not gradient:
        return loss, mx.zeros_like(hidden)
    return loss, (expected / z - _rows(layer, batch.wanted)) * batch.weight[:, None]


class _Words:
    """Products with some rows of the weight W [vocabulary, width] of a head that does not train.

    On a CPU a quantized W is written out; Metal has kernels for the packed one.
    """

    def __init__(self, layer: nn.Module, part: slice, *, after: mx.array) -> None:
        self.bias: mx.array | None = layer.bias[part] if "bias" in layer else None
        self.packed: nn.Module | None = None
        if not isinstance(layer, _PACKED):
            self.weight = layer.weight[part]
        elif device.on_cpu():
            self.weight = dequantize(_packed_rows(layer, part), after=after)
        else:
            self.packed = _packed_rows(layer, part)

    def logits(self, hidden: mx.array) -> mx.array:
        """h W^T + bias."""
        logits = hidden @ self.weight.T if self.packed is None else self._product(hidden, transpose=True)
        return logits if self.bias is None else logits + self.bias

    def times(self, p: mx.array) -> mx.array:
        """p W in float32."""
        if self.packed is None:
            return (p.astype(self.weight.dtype) @ self.weight).astype(mx.float32)
        return self._product(p.astype(self.packed.scales.dtype), transpose=False).astype(mx.float32)

    def _product(self, x: mx.array, *, transpose: bool) -> mx.array:
        layer = self.packed
        assert layer is not None
        return mx.quantized_matmul(
            x,
            layer.weight,
            layer.scales,
            layer.get("biases"),
            transpose=transpose,
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
        )


def _packed_rows(layer: nn.Module, rows: slice | mx.array) -> nn.Module:
    """Some rows of a quantized layer's weight, still packed."""
    some = nn.Module()
    some.weight, some.scales = layer.weight[rows], layer.scales[rows]
    if layer.get("biases") is not None:
        some.biases = layer.biases[rows]
    some.group_size, some.bits, some.mode = layer.group_size, layer.bits, layer.mode
    return some


def _rows(layer: nn.Module, wanted: mx.array) -> mx.array:
    """W[wanted] in float32."""
    if isinstance(layer, _PACKED):
        return dequantize(_packed_rows(layer, wanted))
    rows: mx.array = layer.weight[wanted].astype(mx.float32)
    return rows


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
    return [layer for layer in found if isinstance(layer, nn.Module)]  # talkie's head is a bare array
