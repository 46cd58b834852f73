"""ChatGLM-6B in plain torch, written from its description and independent of the MLX model.

Takes the checkpoint's tensors by name, and one row at a time: its context is what stands before <sop>, the
mask's place is looked up in the row, rotations are complex numbers, attention is written out head by head.
The published code multiplies queries by 1 / (sqrt(size) (layer + 1)) and scores by layer + 1: the same.
"""

import math
from typing import Any

import torch

__all__ = ["make_weights", "run"]


def run(weights: dict[str, torch.Tensor], config: dict[str, Any], ids: list[int]) -> torch.Tensor:
    """Logits [time, vocabulary] of the token ids of one text."""
    time, sop = len(ids), config["bos_token_id"]
    context = ids.index(sop) if sop in ids else time
    mask_token = config["gmask_token_id"] if config["gmask_token_id"] in ids else config["mask_token_id"]
    mask_place = ids.index(mask_token) if mask_token in ids else context - 1
    places = [(i, 0) if i < context else (mask_place, i - context + 1) for i in range(time)]
    sees = torch.zeros(time, time, dtype=torch.bool)
    for i in range(time):
        for j in range(time):
            sees[i, j] = j <= i or j < context
    x = weights["transformer.word_embeddings.weight"][torch.tensor(ids)]
    alpha = math.sqrt(2 * config["num_layers"])
    for number in range(config["num_layers"]):
        name = f"transformer.layers.{number}."
        normed = _norm(x, weights, name + "input_layernorm", config)
        x = alpha * normed + _attention(normed, weights, name + "attention.", config, places, sees)
        normed = _norm(x, weights, name + "post_attention_layernorm", config)
        inner = _linear(normed, weights, name + "mlp.dense_h_to_4h")
        tanh = torch.tanh(math.sqrt(2 / math.pi) * inner * (1 + 0.044715 * inner * inner))
        x = alpha * normed + _linear(0.5 * inner * (1 + tanh), weights, name + "mlp.dense_4h_to_h")
    return _norm(x, weights, "transformer.final_layernorm", config) @ weights["lm_head.weight"].T


def _attention(
    x: torch.Tensor,
    weights: dict[str, torch.Tensor],
    name: str,
    config: dict[str, Any],
    places: list[tuple[int, int]],
    sees: torch.Tensor,
) -> torch.Tensor:
    heads = config["num_attention_heads"]
    size = config["hidden_size"] // heads
    fused = _linear(x, weights, name + "query_key_value").reshape(len(x), heads, 3, size)
    out = torch.empty(len(x), heads, size)
    for head in range(heads):
        queries, keys, values = (fused[:, head, part] for part in range(3))
        scores = _rotate(queries, places) @ _rotate(keys, places).T / math.sqrt(size)
        out[:, head] = torch.softmax(scores.masked_fill(~sees, float("-inf")), dim=-1) @ values
    return _linear(out.reshape(len(x), -1), weights, name + "dense")


def _rotate(x: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
    """Each half of the vector turns by one of the two positions; number i goes with number i + quarter."""
    quarter = x.shape[-1] // 4
    frequencies = torch.tensor([10000 ** (-2 * i / (2 * quarter)) for i in range(quarter)]).half().float()
    out = []
    for which in range(2):
        half = x[:, 2 * quarter * which : 2 * quarter * (which + 1)]
        angles = torch.tensor([place[which] for place in places])[:, None] * frequencies
        turned = torch.complex(half[:, :quarter], half[:, quarter:]) * torch.polar(
            torch.ones_like(angles), angles
        )
        out += [turned.real, turned.imag]
    return torch.cat(out, dim=-1)


def _norm(
    x: torch.Tensor, weights: dict[str, torch.Tensor], name: str, config: dict[str, Any]
) -> torch.Tensor:
    x = x - x.mean(dim=-1, keepdim=True)
    size = torch.sqrt((x * x).mean(dim=-1, keepdim=True) + config["layernorm_epsilon"])
    return x / size * weights[name + ".weight"] + weights[name + ".bias"]


def _linear(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def make_weights(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the checkpoint's names."""
    torch.manual_seed(seed)
    width, inner = config["hidden_size"], config["inner_hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.word_embeddings.weight": (config["vocab_size"], width),
        "lm_head.weight": (config["vocab_size"], width),
    }
    norms = ["transformer.final_layernorm"]
    for number in range(config["num_layers"]):
        name = f"transformer.layers.{number}."
        norms += [name + "input_layernorm", name + "post_attention_layernorm"]
        linears = {
            name + "attention.query_key_value": (3 * width, width),
            name + "attention.dense": (width, width),
            name + "mlp.dense_h_to_4h": (inner, width),
            name + "mlp.dense_4h_to_h": (width, inner),
        }
        shapes |= {f"{layer}.weight": shape for layer, shape in linears.items()}
        shapes |= {f"{layer}.bias": shape[:1] for layer, shape in linears.items()}
    shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    weights = {
        name: (1.0 if name.endswith("norm.weight") else 0.0) + 0.15 * torch.randn(shape)
        for name, shape in shapes.items()
    }
    size = config["hidden_size"] // config["num_attention_heads"]
    for number in range(config["num_layers"]):
        weights[f"transformer.layers.{number}.attention.rotary_emb.inv_freq"] = torch.ones(size // 4)
    return weights
