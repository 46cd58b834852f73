"""Routers of experts as transformers computes them."""

from typing import Any

import mlx.core as mx

from mlx_adapters.models.architectures.row import Config

__all__ = ["choose_with_bias", "normalise_chosen", "weigh_all_experts"]


def weigh_all_experts(model: Any, config: Config) -> None:
    """Jamba: the weights of the chosen experts are their shares among all; mlx-lm's add up to one."""
    for layer in model.layers:
        block = layer.feed_forward
        if "router" in block:
            block.__class__ = _sharing(type(block))


def _sharing(base: type) -> type:
    def call(self: Any, x: mx.array) -> mx.array:
        shares = mx.softmax(self.router(x), axis=-1, precise=True)
        chosen = _largest(shares, self.num_experts_per_tok)
        weights = mx.take_along_axis(shares, chosen, axis=-1)
        return (self.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)

    return type(base.__name__, (base,), {"__call__": call})


def choose_with_bias(model: Any, config: Config) -> None:
    """ERNIE 4.5: the experts are chosen by their shares and a bias, a tensor that mlx-lm drops."""
    for layer in model.layers:
        if "switch_mlp" in layer.mlp:
            layer.mlp.__class__ = _biased(type(layer.mlp), float(config.get("moe_norm_min") or 1e-12))
            layer.mlp.e_score_correction_bias = mx.zeros((config["moe_num_experts"],))


def _biased(base: type, least: float) -> type:
    def call(self: Any, x: mx.array) -> mx.array:
        shares = self.gate_act(self.gate(x).astype(mx.float32))
        chosen = _largest(shares + self.e_score_correction_bias, self.k)
        weights = mx.take_along_axis(shares, chosen, axis=-1)
        weights = weights / mx.maximum(weights.sum(axis=-1, keepdims=True), least)
        y = self.switch_mlp(x, chosen)
        y = (y * weights[..., None]).sum(axis=-2).astype(y.dtype)
        return y if self.shared_experts is None else y + self.shared_experts(x)

    return type(base.__name__, (base,), {"__call__": call})


def normalise_chosen(model: Any, config: Config) -> None:
    """Qwen2-MoE: the weights of the chosen experts add up to one where `norm_topk_prob` says so."""
    if not config.get("norm_topk_prob"):
        return
    for layer in model.layers:
        if "switch_mlp" in layer.mlp:
            layer.mlp.__class__ = _normalising(type(layer.mlp))


def _normalising(base: type) -> type:
    def call(self: Any, x: mx.array) -> mx.array:
        shares = mx.softmax(self.gate(x), axis=-1, precise=True)
        chosen = _largest(shares, self.top_k)
        weights = mx.take_along_axis(shares, chosen, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        y = (self.switch_mlp(x, chosen) * weights[..., None].astype(x.dtype)).sum(axis=-2)
        return y + mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)

    return type(base.__name__, (base,), {"__call__": call})


def _largest(scores: mx.array, count: int) -> mx.array:
    return mx.stop_gradient(mx.argpartition(-scores, kth=count - 1, axis=-1)[..., :count])
