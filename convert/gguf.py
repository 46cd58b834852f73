"""Read a GGUF file of the llama family: config, weights under Hugging Face's names, tokenizer.

Quantized tensors keep their exact values: as MLX affine groups where MLX has such groups, else as float32.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_adapters.convert.gguf_blocks import BLOCKS, MLX_GROUP, dense, packed
from mlx_adapters.convert.gguf_file import Container, Tensor, read_container
from mlx_adapters.convert.gguf_tokenizer import ENDS
from mlx_adapters.errors import CheckpointError, UnsupportedError, unknown

__all__ = ["ARCHITECTURES", "GGUF", "read_gguf"]

# GGUF architecture -> (model_type, class); llama.cpp reorders the rows of q and k only for llama
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True)
class GGUF:
    """What a GGUF file holds. `quantization` is MLX's section of config.json, or None for plain weights."""

    config: dict[str, Any]
    weights: dict[str, mx.array]
    quantization: dict[str, Any] | None
    fields: dict[str, Any] = field(repr=False)
    path: Path

    def write_tokenizer(self, dst: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json to the folder `dst`."""
        from mlx_adapters.convert.gguf_tokenizer import write

        write(self.fields, dst, source=self.path)


def read_gguf(path: Path, *, keep_quantized: bool) -> GGUF:
    """Read `path`; with `keep_quantized`, quantized matrices become MLX's packed groups without loss.

    Raises CheckpointError for a file that is truncated or inconsistent, and UnsupportedError for an
    architecture, a tensor type or a rope scaling that is not read.
    """
    container = read_container(Path(path))
    config = _Config(container).build()
    weights: dict[str, mx.array] = {}
    bits: dict[str, int] = {}
    for tensor in container.tensors.values():
        if tensor.name != _ROPE_FACTORS:
            _add(container, tensor, config, weights, bits if keep_quantized else None)
    return GGUF(
        config=config,
        weights=weights,
        quantization=_quantization(bits),
        fields=container.fields,
        path=container.path,
    )


# Config ----------------------------------------------------------------------------------------------------


class _Config:
    """Builds config.json's fields from the metadata, each checked for presence and type."""

    def __init__(self, container: Container) -> None:
        self.container, self.path, self.fields = container, container.path, container.fields
        arch = self.fields.get("general.architecture")
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            raise UnsupportedError(f"{self.path}: {unknown('architecture', str(arch)[:60], ARCHITECTURES)}")
        self.arch = arch

    def build(self) -> dict[str, Any]:
        """The fields of config.json, in Hugging Face's names."""
        if self.whole("expert_count", 0):
            raise UnsupportedError(f"{self.path}: is a mixture of experts, which is not read from GGUF")
        tensors = self.container.tensors
        heads, hidden = self.whole("attention.head_count"), self.whole("embedding_length")
        embedding = tensors.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path}: has no tensor 'token_embd.weight'; is it only a part?")
        if not heads or not hidden:
            raise CheckpointError(f"{self.path}: says it has no heads or no width; download it again")
        model_type, model_class = ARCHITECTURES[self.arch]
        head_dim = self.whole("attention.key_length", hidden // heads)
        if self.whole("rope.dimension_count", head_dim) != head_dim:
            raise UnsupportedError(f"{self.path}: rope turns only a part of each head, which is not read")
        config = {
            "architectures": [model_class],
            "model_type": model_type,
            "vocab_size": embedding.shape[0],
            "hidden_size": hidden,
            "intermediate_size": self.whole("feed_forward_length"),
            "num_hidden_layers": self.whole("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.whole("attention.head_count_kv", heads) or heads,
            "head_dim": head_dim,
            "max_position_embeddings": self.whole("context_length"),
            "rms_norm_eps": self.real("attention.layer_norm_rms_epsilon", 1e-5),
            "rope_theta": self.real("rope.freq_base", 10000.0),
            "rope_scaling": self.rope_scaling(head_dim),
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in tensors,
        }
        if self.arch == "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in tensors
            config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
        if "tokenizer.ggml.bos_token_id" in self.fields:
            config["bos_token_id"] = self.fields["tokenizer.ggml.bos_token_id"]
        names = [f"tokenizer.ggml.{end}_token_id" for end in ENDS]
        if ends := [self.fields[name] for name in names if name in self.fields]:
            config["eos_token_id"] = ends
        return config

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number of this architecture; CheckpointError when it is missing or is not one."""
        value = self.fields.get(f"{self.arch}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.wrong(name, "count", value)
        return value

    def real(self, name: str, default: float) -> float:
        """A number as it was before float32 rounded it: 1e-05 and not 9.999999747378752e-06."""
        value = self.fields.get(f"{self.arch}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.wrong(name, "positive number", value)
        return float(str(np.float32(value)))

    def wrong(self, name: str, expected: str, value: Any) -> CheckpointError:
        """The error for a metadata field that is not what it should be."""
        found = "missing" if value is None else repr(value)[:60]
        return CheckpointError(
            f"{self.path}: metadata '{self.arch}.{name}' should be a {expected}, it is {found}; "
            "download the file again"
        )

    def rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        """Linear scaling from the metadata, Llama 3's from its factors; others are refused."""
        kind = self.fields.get(f"{self.arch}.rope.scaling.type", "none")
        if _ROPE_FACTORS in self.container.tensors:
            return self._llama3(head_dim)
        if kind == "none":
            return None
        if kind != "linear":
            raise UnsupportedError(f"{self.path}: rope scaling {str(kind)[:60]!r} is not read from GGUF")
        return {"type": "linear", "rope_type": "linear", "factor": self.real("rope.scaling.factor", 1.0)}

    def _llama3(self, head_dim: int) -> dict[str, Any]:
        # the file holds one factor a frequency; Llama 3.1 to 3.3 differ only in the largest
        tensor = self.container.tensors[_ROPE_FACTORS]
        if tensor.kind != 0 or tensor.shape != (head_dim // 2,):
            raise CheckpointError(f"{self.path}: '{_ROPE_FACTORS}' has the wrong shape or type")
        found = self.container.bytes_of(tensor).view("<f4").astype(np.float64)
        factor, old, low, high = float(found.max()), 8192, 1.0, 4.0
        theta = self.real("rope.freq_base", 10000.0)
        lengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        smooth = np.clip((old / lengths - low) / (high - low), 0.0, 1.0)
        if not np.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
            raise UnsupportedError(f"{self.path}: '{_ROPE_FACTORS}' is not the rope scaling of Llama 3")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": old,
        }


# Weights ---------------------------------------------------------------------------------------------------


def _add(
    container: Container,
    tensor: Tensor,
    config: dict[str, Any],
    weights: dict[str, mx.array],
    bits: dict[str, int] | None,
) -> None:
    name = _name(container.path, tensor.name)
    order = _row_order(container.path, tensor, config)
    if tensor.kind not in BLOCKS:
        plain = _plain(container, tensor)
        weights[name] = plain if order is None else plain[mx.array(order)]
        return
    rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
    groups = BLOCKS[tensor.kind].groups(container.bytes_of(tensor), rows)
    if order is not None:
        groups = groups.rows(order)
    if bits is None or groups.group != MLX_GROUP or len(tensor.shape) != 2:
        weights[name] = dense(groups).reshape(tensor.shape)
        return
    module = name.removesuffix(".weight")
    bits[module] = groups.bits
    names = (f"{module}.weight", f"{module}.scales", f"{module}.biases")
    weights |= zip(names, packed(groups), strict=True)


def _name(path: Path, name: str) -> str:
    base, _, ending = name.rpartition(".")
    if base in _TOP and ending == "weight":
        return f"{_TOP[base]}.{ending}"
    block, _, rest = base.removeprefix("blk.").partition(".")
    if base.startswith("blk.") and block.isdecimal() and rest in _LAYER and ending in ("weight", "bias"):
        return f"model.layers.{int(block)}.{_LAYER[rest]}.{ending}"
    raise UnsupportedError(f"{path}: tensor {name[:80]!r} belongs to no model that is read from GGUF")


def _row_order(path: Path, tensor: Tensor, config: dict[str, Any]) -> NDArray[np.int64] | None:
    """Undo llama.cpp's order of q's and k's rows: it pairs neighbours, Hugging Face pairs the two halves."""
    part = tensor.name.rpartition(".")[0].rpartition(".")[2]
    if config["model_type"] != "llama" or part not in _HEADS:
        return None
    count, width, rows = config[_HEADS[part]], config["head_dim"], tensor.shape[0]
    if rows != count * width or width % 2:
        raise CheckpointError(
            f"{path}: tensor '{tensor.name}' has {rows} rows, not {count} heads of {width}; download it again"
        )
    places = np.arange(rows, dtype=np.int64).reshape(count, width // 2, 2)
    return places.swapaxes(1, 2).reshape(-1)


def _plain(container: Container, tensor: Tensor) -> mx.array:
    raw = container.bytes_of(tensor)
    if tensor.kind == 30:  # numpy has no bfloat16
        return mx.array(raw.view("<u2").reshape(tensor.shape)).view(mx.bfloat16)
    return mx.array(raw.view("<f4" if tensor.kind == 0 else "<f2").reshape(tensor.shape))


def _quantization(bits: dict[str, int]) -> dict[str, Any] | None:
    if not bits:
        return None
    usual = Counter(bits.values()).most_common(1)[0][0]
    section: dict[str, Any] = {"group_size": MLX_GROUP, "bits": usual, "mode": "affine"}
    others = {name: count for name, count in bits.items() if count != usual}
    return section | {
        name: {"group_size": MLX_GROUP, "bits": count, "mode": "affine"} for name, count in others.items()
    }
