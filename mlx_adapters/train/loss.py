"""Cross entropy of the labels, with logits computed only where one is predicted.

The base is frozen, so nothing needs the logits of the other positions. The hidden states are picked before
the output head wherever the model is `head(backbone(ids))`; that is found out by comparing the two on a
short input, so a model with a twist in its head (soft-capping, a scale) takes the plain way.

Where the head is a frozen linear layer, the gradient with respect to the hidden state is formed with the
loss, one chunk of the vocabulary after the other: nothing of the size tokens x vocabulary is ever there.

    p = softmax(h W^T),  loss = sum_i w_i (-log p_i[y_i]),  d loss / d h_i = w_i (p_i W - W[y_i])

As in an online softmax (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867): the sums of e^l and of
e^l W are carried from chunk to chunk, and scaled down where a larger logit l comes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters import device
from mlx_adapters.adapter.call import apart, call_model
from mlx_adapters.cpu import exponential
from mlx_adapters.cpu.quantized import dequantize
from mlx_adapters.data.batches import Batch
from mlx_adapters.errors import UnsupportedError
from mlx_adapters.models import sites

__all__ = ["Head", "loss_sum", "split_head", "undifferentiable"]

# Logits of a chunk of the vocabulary. On a CPU a few arrays of so many stay in the cache; a GPU wants larger
# products.
_LOGITS = {"cpu": 1 << 21, "gpu": 1 << 24}
_CHUNK = 1024  # the tokens of a chunk are a multiple of it
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
    batch: Batch,
    *,
    head: Head | None,
    gradient: bool = True,
    cache: list[Any] | None = None,
) -> mx.array:
    """Summed cross entropy of the labels of `batch`, a float32 scalar in nats; 0 where it has none.

    Args:
        model: the model, with its adapter.
        batch: its `tokens` and `supervised` are not used.
        head: what `split_head` found; with None all logits are computed.
        gradient: whether a gradient will be asked for; without one the value takes less time.
        cache: a cache for each layer, to call the model with.
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
        return _chunked_cross_entropy(hidden, batch, head.layer, gradient=False)[0]

    @mx.custom_function
    def fused(hidden: mx.array) -> tuple[mx.array, mx.array]:
        return _chunked_cross_entropy(hidden, batch, head.layer, gradient=True)

    @fused.vjp
    def pull(primals: Any, cotangents: Any, outputs: Any) -> mx.array:
        slope: mx.array = outputs[1]
        return (cotangents[0] * slope).astype(primals.dtype)

    value: mx.array = fused(hidden)[0]  # type: ignore[index]
    return value


def _cross_entropy(logits: mx.array, batch: Batch) -> mx.array:
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), batch.labels)
    return (losses * batch.weights).sum()


def _chunked_cross_entropy(
    hidden: mx.array, batch: Batch, layer: nn.Module, *, gradient: bool
) -> tuple[mx.array, mx.array]:
    """(loss, its gradient with respect to `hidden`), one chunk of the vocabulary after the other."""
    count, vocabulary = hidden.shape[0], layer.weight.shape[0]
    kind = "cpu" if device.on_cpu() else "gpu"
    size = max(1, _LOGITS[kind] // (max(1, count) * _CHUNK)) * _CHUNK
    largest = mx.full((count, 1), -math.inf)
    label_logits, z = mx.zeros((count,)), mx.zeros((count, 1))
    weighted_rows = mx.zeros(hidden.shape)  # the sum of e^l W
    for first in range(0, vocabulary, size):
        # a chunk waits for all that is made of the one before: else the logits of all are alive together
        states = mx.depends([hidden], [z, weighted_rows, label_logits])[0]
        chunk = _VocabChunk(layer, slice(first, first + size), after=states)
        logits = chunk.logits(states).astype(mx.float32)
        index = batch.labels - first
        inside = (index >= 0) & (index < logits.shape[1])
        index = mx.clip(index, 0, logits.shape[1] - 1)
        label_logits = label_logits + mx.where(
            inside, mx.take_along_axis(logits, index[:, None], axis=-1)[:, 0], 0.0
        )
        before, largest = largest, mx.maximum(largest, logits.max(axis=-1, keepdims=True))
        p = exponential.shifted_exp(logits, largest) if kind == "cpu" else mx.exp(logits - largest)
        scale = mx.exp(before - largest)
        z = z * scale + p.sum(axis=-1, keepdims=True)
        if gradient:
            weighted_rows = weighted_rows * scale + chunk.times(p)
    loss = (((largest + mx.log(z))[:, 0] - label_logits) * batch.weights).sum()
    if not gradient:
        return loss, mx.zeros_like(hidden)
    return loss, (weighted_rows / z - _rows(layer, batch.labels)) * batch.weights[:, None]


class _VocabChunk:
    """Products with some rows of the weight W [vocabulary, width] of a head that does not train.

    On a CPU a quantized W is written out; Metal has kernels for the packed one.
    """

    def __init__(self, layer: nn.Module, rows: slice, *, after: mx.array) -> None:
        self.bias: mx.array | None = layer.bias[rows] if "bias" in layer else None
        self.packed: nn.Module | None = None
        if not isinstance(layer, _PACKED):
            self.weight = layer.weight[rows]
        elif device.on_cpu():
            self.weight = dequantize(_packed_rows(layer, rows), after=after)
        else:
            self.packed = _packed_rows(layer, rows)

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


def _rows(layer: nn.Module, labels: mx.array) -> mx.array:
    """W[labels] in float32."""
    if isinstance(layer, _PACKED):
        return dequantize(_packed_rows(layer, labels))
    rows: mx.array = layer.weight[labels].astype(mx.float32)
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


def undifferentiable(model: nn.Module, error: ValueError) -> Exception:
    """What to raise for an error of differentiating `model`: UnsupportedError where it is the model's own."""
    if "VJP" not in str(error):
        return error
    name = type(model).__module__.rpartition(".")[2]
    return UnsupportedError(
        f"mlx-lm's {name} model cannot be differentiated, so nothing trains on it ({error})"
    )
