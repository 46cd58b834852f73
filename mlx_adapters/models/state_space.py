"""State-space layers as transformers computes them."""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.models.architectures.row import Config
from mlx_adapters.models.reference import reference
from mlx_adapters.rebind import replace_call

__all__ = ["fold_multipliers", "group_gated_norms", "limit_time_steps"]


def limit_time_steps(model: Any, config: Config) -> None:
    """The limits of time steps that transformers reads; mlx-lm reads others, or none.

    transformers does not apply them where it goes on token by token from a cache; here they always hold.
    """
    rule = reference(config["model_type"]).time_step
    if rule is None:
        return
    limits = config.get("time_step_limit") or (0.0, math.inf)
    if rule == "floor":
        limits = (config.get("time_step_min", config.get("mamba_dt_min", 0.001)), math.inf)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = tuple(float(value) for value in limits)


def group_gated_norms(model: Any, config: Config) -> None:
    """Gated norms over each group of a state-space layer's heads; mlx-lm's files norm all at once."""
    groups = int(config.get("n_groups") or config.get("mamba_n_groups") or 1)
    for module in model.modules():
        if groups > 1 and type(module).__name__.endswith("RMSNormGated"):
            module.__class__ = _grouped(type(module), groups)


def _grouped(base: type, groups: int) -> type:
    def call(self: Any, hidden_states: mx.array, gate: mx.array | None = None) -> mx.array:
        x, first = hidden_states, not getattr(self, "norm_before_gate", False)
        eps = getattr(self, "eps", None) or self.variance_epsilon
        if gate is not None and first:
            x = nn.silu(gate) * x
        x = mx.fast.rms_norm(mx.unflatten(x, -1, (groups, -1)), None, eps).flatten(-2) * self.weight
        return x if gate is None or first else nn.silu(gate) * x

    return replace_call(base, call)


def fold_multipliers(weights: dict[str, mx.array], config: Config) -> dict[str, mx.array]:
    """Falcon-H1: the multipliers that mlx-lm forgets when it folds the others into the weights: that of keys,
    which it looks for under another name, that of values, and those of biases."""
    convolution = weights.get("model.layers.0.mamba.conv1d.weight")
    if convolution is None or convolution.shape[-1] <= convolution.shape[1]:
        return weights  # in mlx-lm's form, with everything folded in
    enters, key = config.get("attention_in_multiplier", 1.0), config.get("key_multiplier", 1.0)
    gate, down = config.get("mlp_multipliers") or (1.0, 1.0)
    factors: dict[str, Any] = {
        "k_proj.weight": key,
        "v_proj.weight": enters,
        "k_proj.bias": key,
        "o_proj.bias": config.get("attention_out_multiplier", 1.0),
        "in_proj.bias": _of_parts(config),
        "out_proj.bias": config.get("ssm_out_multiplier", 1.0),
        "gate_proj.bias": gate,
        "down_proj.bias": down,
    }
    folded = {}
    for name, array in weights.items():
        factor = next((f for end, f in factors.items() if name.endswith("." + end)), 1.0)
        folded[name] = array if isinstance(factor, float) and factor == 1.0 else array * factor
    return folded


def _of_parts(config: Config) -> mx.array:
    """Falcon-H1: the multiplier of each row of a mixer's first layer, which makes gate, x, B, C and steps."""
    inner, states = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
    sizes = (inner, inner, states, states, config["mamba_n_heads"])
    multipliers = config.get("ssm_multipliers") or (1.0,) * len(sizes)
    return mx.concatenate([mx.full((n,), m) for n, m in zip(sizes, multipliers, strict=True)])
