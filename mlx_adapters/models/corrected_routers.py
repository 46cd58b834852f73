"""Routers of experts as transformers computes them."""

from typing import Any

import mlx.core as mx

from mlx_adapters.models.architectures.row import Config
from mlx_adapters.rebind import replace_call

__all__ = ["choose_with_bias", "correct_groups", "normalise_chosen", "weigh_all_experts"]


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

    return replace_call(base, call)


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

    return replace_call(base, call)


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

    return replace_call(base, call)


def _largest(scores: mx.array, count: int) -> mx.array:
    return mx.stop_gradient(mx.argpartition(-scores, kth=count - 1, axis=-1)[..., :count])


# Groups of experts -----------------------------------------------------------------------------------------

_GATE = (
    *("weight", "e_score_correction_bias", "top_k", "n_group", "topk_group"),
    *("routed_scaling_factor", "norm_topk_prob"),
)


def correct_groups(model: Any, config: Config) -> None:
    """No expert of a group that was not chosen, and weights that add up to one for a single expert too.

    mlx-lm gives the other groups' experts the score 0, which is more than a negative bias leaves of a chosen
    one's. A router is ours where it agrees with mlx-lm's on scores above 0.
    """
    for module in model.modules():
        if not all(hasattr(module, name) for name in _GATE):
            continue
        differs = (module.n_group or 1) > 1 or (module.top_k == 1 and module.norm_topk_prob)
        if differs and _agrees(module):
            module.__class__ = _of_groups(type(module))


def _of_groups(base: type) -> type:
    def call(self: Any, x: mx.array) -> Any:
        return _choose(
            x @ self.weight.T,
            self.e_score_correction_bias,
            self.top_k,
            self.n_group or 1,
            self.topk_group or 1,
            self.routed_scaling_factor,
            self.norm_topk_prob,
        )

    return replace_call(base, call)


@mx.compile
def _choose(
    gates: mx.array, bias: mx.array, count: int, groups: int, kept: int, scale: float, normalised: bool
) -> tuple[mx.array, mx.array]:
    """(experts, weights): the `count` largest of sigmoid(gates) + bias, in the `kept` best of the groups."""
    shares = mx.sigmoid(gates.astype(mx.float32))
    scores = shares + bias
    if dropped := groups - kept:
        grouped = mx.unflatten(scores, axis=-1, shape=(groups, -1))
        best = mx.topk(grouped, 2, axis=-1).sum(axis=-1, keepdims=True)
        worst = mx.argpartition(best, kth=dropped - 1, axis=-2)[..., :dropped, :]
        grouped = mx.put_along_axis(grouped, mx.stop_gradient(worst), mx.array(-mx.inf), axis=-2)
        scores = mx.flatten(grouped, -2, -1)
    chosen = _largest(scores, count)
    weights = mx.take_along_axis(shares, chosen, axis=-1)
    if normalised:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return chosen, weights * scale


def _agrees(module: Any) -> bool:
    """Whether mlx-lm's router is the same function where no score is below 0."""
    kind: Any = type(module)
    copy = kind.__new__(kind)
    copy.__dict__.update(module.__dict__)
    dict.update(copy, module)
    experts, width = module.weight.shape
    copy.top_k = max(2, module.top_k)
    dict.__setitem__(copy, "weight", mx.sin(mx.arange(experts * width) * 0.7).reshape(experts, width))
    dict.__setitem__(copy, "e_score_correction_bias", 1.0 + 0.1 * mx.cos(mx.arange(experts)))
    x = mx.cos(mx.arange(4 * width) * 0.3).reshape(1, 4, width)
    try:
        found = kind.__call__(copy, x)
        ours = _of_groups(kind).__call__(copy, x)
        one, two = (
            mx.put_along_axis(mx.zeros((1, 4, experts)), chosen, weights, axis=-1)
            for chosen, weights in (found, ours)
        )
        return bool(mx.allclose(one, two, rtol=1e-4, atol=1e-6))
    except Exception:  # a model file's own kind of router
        return False
