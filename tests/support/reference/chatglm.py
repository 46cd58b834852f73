"""ChatGLM2 in plain torch, written from its description and independent of the MLX model.

Takes the checkpoint's tensors by name. Everything is computed token pair by token pair where that is the
plainest way to say it: rotations as complex numbers, attention with an explicit mask, no fused kernels.
"""

from typing import Any

import torch

__all__ = ["make_weights", "run"]


def run(weights: dict[str, torch.Tensor], config: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Logits [rows, time, vocabulary] of token ids [rows, time]."""
    x = weights["transformer.embedding.word_embeddings.weight"][ids]
    for number in range(config["num_layers"]):
        x = _block(x, weights, f"transformer.encoder.layers.{number}.", config)
    if config["post_layer_norm"]:
        x = _norm(x, weights, "transformer.encoder.final_layernorm", config)
    return x @ weights["transformer.output_layer.weight"].T


def _block(
    x: torch.Tensor, weights: dict[str, torch.Tensor], name: str, config: dict[str, Any]
) -> torch.Tensor:
    after = config.get("apply_residual_connection_post_layernorm", False)
    normed = _norm(x, weights, name + "input_layernorm", config)
    x = (normed if after else x) + _attention(normed, weights, name + "self_attention.", config)
    normed = _norm(x, weights, name + "post_attention_layernorm", config)
    both = _linear(normed, weights, name + "mlp.dense_h_to_4h")
    gate, value = both[..., : config["ffn_hidden_size"]], both[..., config["ffn_hidden_size"] :]
    inner = gate / (1 + torch.exp(-gate)) * value
    return (normed if after else x) + _linear(inner, weights, name + "mlp.dense_4h_to_h")


def _attention(
    x: torch.Tensor, weights: dict[str, torch.Tensor], name: str, config: dict[str, Any]
) -> torch.Tensor:
    heads, size = config["num_attention_heads"], config["kv_channels"]
    fused = _linear(x, weights, name + "query_key_value")
    rows, time, _ = fused.shape
    if config["multi_query_attention"]:
        groups = config["multi_query_group_num"]
        queries = fused[..., : heads * size].reshape(rows, time, heads, size)
        keys = fused[..., heads * size : (heads + groups) * size].reshape(rows, time, groups, size)
        values = fused[..., (heads + groups) * size :].reshape(rows, time, groups, size)
    else:
        groups = heads
        parts = fused.reshape(rows, time, heads, 3, size)
        queries, keys, values = parts[..., 0, :], parts[..., 1, :], parts[..., 2, :]
    base = 10000 * config.get("rope_ratio", 1.0)
    queries, keys = _rotate(queries, base), _rotate(keys, base)
    out = torch.empty(rows, time, heads, size)
    allowed = torch.tril(torch.ones(time, time, dtype=torch.bool))
    for head in range(heads):
        group = head * groups // heads
        scores = queries[:, :, head] @ keys[:, :, group].transpose(1, 2) / size**0.5
        scores = scores.masked_fill(~allowed, float("-inf"))
        out[:, :, head] = torch.softmax(scores, dim=-1) @ values[:, :, group]
    return _linear(out.reshape(rows, time, heads * size), weights, name + "dense")


def _rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """The first half of each head turns, in neighbouring pairs, by its position times a frequency."""
    half = x.shape[-1] // 2
    frequencies = torch.tensor([base ** (-i / half) for i in range(0, half, 2)])
    angles = torch.arange(x.shape[1])[:, None] * frequencies[None]
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    pairs = torch.view_as_complex(x[..., :half].reshape(*x.shape[:-1], half // 2, 2).contiguous())
    turned = torch.view_as_real(pairs * turns).reshape(*x.shape[:-1], half)
    return torch.cat([turned, x[..., half:]], dim=-1)


def _norm(
    x: torch.Tensor, weights: dict[str, torch.Tensor], name: str, config: dict[str, Any]
) -> torch.Tensor:
    shift = torch.zeros(())
    if not config["rmsnorm"]:
        x, shift = x - x.mean(dim=-1, keepdim=True), weights[name + ".bias"]
    size = torch.sqrt((x * x).mean(dim=-1, keepdim=True) + config["layernorm_epsilon"])
    return x / size * weights[name + ".weight"] + shift


def _linear(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    y = x @ weights[name + ".weight"].T
    return y + weights[name + ".bias"] if name + ".bias" in weights else y


def make_weights(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the checkpoint's names."""
    torch.manual_seed(seed)
    width, inner = config["hidden_size"], config["ffn_hidden_size"]
    heads, size = config["num_attention_heads"], config["kv_channels"]
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else heads
    fused = (heads + 2 * groups) * size
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (config["padded_vocab_size"], width),
        "transformer.output_layer.weight": (config["padded_vocab_size"], width),
    }
    norms = ["transformer.encoder.final_layernorm"] if config["post_layer_norm"] else []
    for number in range(config["num_layers"]):
        name = f"transformer.encoder.layers.{number}."
        norms += [name + "input_layernorm", name + "post_attention_layernorm"]
        shapes |= {
            name + "self_attention.query_key_value.weight": (fused, width),
            name + "self_attention.dense.weight": (width, heads * size),
            name + "mlp.dense_h_to_4h.weight": (2 * inner, width),
            name + "mlp.dense_4h_to_h.weight": (width, inner),
        }
        biased = ["self_attention.query_key_value"] if config["add_qkv_bias"] else []
        if config["add_bias_linear"]:
            biased = ["self_attention.query_key_value", "self_attention.dense"]
            biased += ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
        shapes |= {f"{name}{layer}.bias": shapes[f"{name}{layer}.weight"][:1] for layer in biased}
    shapes |= {norm + ".weight": (width,) for norm in norms}
    if not config["rmsnorm"]:
        shapes |= {norm + ".bias": (width,) for norm in norms}
    weights = {
        name: (1.0 if name.endswith("norm.weight") else 0.0) + 0.15 * torch.randn(shape)
        for name, shape in shapes.items()
    }
    weights["transformer.rotary_pos_emb.inv_freq"] = torch.ones(size // 4)
    return weights
