"""The metadata of a GGUF file as checked numbers, and what every language model has of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_adapters.convert.gguf_file import Container
from mlx_adapters.convert.gguf_tokenizer import ENDS
from mlx_adapters.errors import CheckpointError, UnsupportedError

__all__ = ["ROPE_FACTORS", "Metadata", "common", "rotation"]

ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_LAYERS = 1000  # as many as a model has here at most


class Metadata:
    """The fields of one architecture, each checked for presence and type when it is asked for."""

    def __init__(self, container: Container, arch: str) -> None:
        self.container, self.path, self.arch = container, container.path, arch
        self.fields = container.fields

    def has(self, name: str) -> bool:
        """Whether the file says anything of `name`."""
        return f"{self.arch}.{name}" in self.fields

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number of this architecture; CheckpointError when it is missing or is not one."""
        value = self.fields.get(f"{self.arch}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.wrong(name, "count", value)
        return value

    def real(self, name: str, default: float | None = None) -> float:
        """A number as it was before float32 rounded it: 1e-05 and not 9.999999747378752e-06."""
        value = self.fields.get(f"{self.arch}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.wrong(name, "positive number", value)
        return float(str(np.float32(value)))

    def by_layer(self, name: str, default: int | None = None) -> list[int]:
        """A count for each layer, of which the file may hold one for all."""
        value, layers = self.fields.get(f"{self.arch}.{name}"), self.layers
        if not isinstance(value, list):
            return [self.whole(name, default)] * layers
        counts = [one for one in value if isinstance(one, int) and not isinstance(one, bool) and one >= 0]
        if len(counts) != len(value) or len(counts) < layers:
            raise self.wrong(name, f"list of {layers} counts", value)
        return counts[:layers]

    def flags(self, name: str, period: int) -> list[bool]:
        """Yes or no for each layer; without a list, no for every layer at a multiple of the period."""
        value, layers = self.fields.get(f"{self.arch}.{name}", period), self.layers
        if isinstance(value, list):
            if len(value) < layers or not all(isinstance(one, bool | int) for one in value):
                raise self.wrong(name, f"list of {layers} flags", value)
            return [bool(one) for one in value[:layers]]
        period = self.whole(name, period)
        return [bool(period) and (layer + 1) % period != 0 for layer in range(layers)]

    @property
    def layers(self) -> int:
        """The number of layers without those that predict further tokens, which are not read."""
        layers = self.whole("block_count") - self.whole("nextn_predict_layers", 0)
        if not 1 <= layers <= _LAYERS:
            raise self.wrong("block_count", "number of layers", self.whole("block_count"))
        return layers

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        heads, hidden = self.by_layer("attention.head_count")[0], self.whole("embedding_length")
        if not heads or not hidden:
            raise CheckpointError(f"{self.path}: says it has no heads or no width; download it again")
        return self.whole("attention.key_length", hidden // heads)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a tensor, rows first; empty where the file has none of that name."""
        found = self.container.tensors.get(tensor)
        return () if found is None else found.shape

    def factors(self, tensor: str, length: int) -> NDArray[np.float64]:
        """The numbers in one of `ROPE_FACTORS`."""
        found = self.container.tensors[tensor]
        if found.kind != 0 or found.shape != (length,):
            raise CheckpointError(f"{self.path}: '{tensor}' has the wrong shape or type")
        return self.container.bytes_of(found).view("<f4").astype(np.float64)

    def wrong(self, name: str, expected: str, value: Any) -> CheckpointError:
        """The error for a metadata field that is not what it should be."""
        found = "missing" if value is None else repr(value)[:60]
        return CheckpointError(
            f"{self.path}: metadata '{self.arch}.{name}' should be a {expected}, it is {found}; "
            "download the file again"
        )

    def refuse(self, name: str, what: str) -> None:
        """UnsupportedError where the file gives `name` a value that is not read."""
        if self.fields.get(f"{self.arch}.{name}"):
            raise UnsupportedError(f"{self.path}: metadata '{self.arch}.{name}' {what}, which is not read")


def common(found: Metadata) -> dict[str, Any]:
    """The fields of config.json that every model here has, in Hugging Face's names."""
    tensors = found.container.tensors
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{found.path}: has no tensor 'token_embd.weight'; is it only a part?")
    heads, head_dim = found.by_layer("attention.head_count"), found.head_dim
    if len(set(heads)) != 1:
        raise UnsupportedError(f"{found.path}: its layers have different numbers of heads, which is not read")
    if found.whole("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(f"{found.path}: has keys and values of different widths, which is not read")
    if found.fields.get(f"{found.arch}.attention.causal") is False:
        raise UnsupportedError(
            f"{found.path}: attends in both directions: it is no model that generates text"
        )
    _fits(found, embedding.shape[-1], heads[0] * head_dim)
    config: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": found.whole("embedding_length"),
        "intermediate_size": found.by_layer("feed_forward_length")[0],
        "num_hidden_layers": found.layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": max(found.by_layer("attention.head_count_kv", heads[0])) or heads[0],
        "head_dim": head_dim,
        "max_position_embeddings": found.whole("context_length"),
        "rms_norm_eps": found.real("attention.layer_norm_rms_epsilon", 1e-5),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    # or transformers takes the family's, which may lie outside the vocabulary
    config["pad_token_id"] = found.fields.get("tokenizer.ggml.padding_token_id")
    if "tokenizer.ggml.bos_token_id" in found.fields:
        config["bos_token_id"] = found.fields["tokenizer.ggml.bos_token_id"]
    names = [f"tokenizer.ggml.{end}_token_id" for end in ENDS]
    if ends := [found.fields[name] for name in names if name in found.fields]:
        config["eos_token_id"] = ends
    return config


def _fits(found: Metadata, width: int, queries: int) -> None:
    """CheckpointError where sizes are not the tensors': modules of any size are built before any is read."""
    if width != found.whole("embedding_length"):
        raise found.wrong(
            "embedding_length", f"width of the tokens, {width}", found.whole("embedding_length")
        )
    tensors = found.container.tensors.items()
    rows = [
        tensor.shape[0] for name, tensor in tensors if name.endswith((".attn_q.weight", ".attn_qkv.weight"))
    ]
    if max(rows, default=0) < queries:
        raise CheckpointError(
            f"{found.path}: has no tensor 'attn_q' of {queries} rows, as its metadata say; download it again"
        )


# Rotations -------------------------------------------------------------------------------------------------


def rotation(found: Metadata, *, theta: float = 10000.0, **others: Any) -> dict[str, Any]:
    """Base, rotated part and scaling of the rotations; `others` are put into the scaling, if there is one.

    A part of a head is rotated where `rope.dimension_count` is less than the head.
    """
    head_dim = found.head_dim
    config: dict[str, Any] = {"rope_theta": found.real("rope.freq_base", theta)}
    rotated = found.whole("rope.dimension_count", head_dim)
    if rotated > head_dim or rotated % 2:
        raise found.wrong("rope.dimension_count", f"count of at most {head_dim}", rotated)
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    scaling = _scaling(found, rotated, config["rope_theta"])
    return config | {"rope_scaling": scaling and scaling | others}


def _scaling(found: Metadata, rotated: int, theta: float) -> dict[str, Any] | None:
    kind = found.fields.get(f"{found.arch}.rope.scaling.type", "none")
    if ROPE_FACTORS[0] in found.container.tensors:
        return _llama3(found, rotated, theta)
    if ROPE_FACTORS[1] in found.container.tensors:
        return _longrope(found, rotated)
    if kind == "none":
        return None
    factor = found.real("rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"type": "linear", "rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedError(f"{found.path}: rope scaling {str(kind)[:60]!r} is not read from GGUF")
    if found.real("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise UnsupportedError(f"{found.path}: YaRN with an extrapolation factor is not read from GGUF")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": found.whole("rope.scaling.original_context_length"),
    }
    for name, field in (
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
        ("yarn_attn_factor", "attention_factor"),
    ):
        if found.has(f"rope.scaling.{name}"):
            scaling[field] = found.real(f"rope.scaling.{name}")
    return scaling


def _longrope(found: Metadata, rotated: int) -> dict[str, Any]:
    long, short = (_listed(found.factors(name, rotated // 2)) for name in ROPE_FACTORS[1:])
    return {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": found.whole("rope.scaling.original_context_length"),
    }


def _listed(numbers: NDArray[np.float64]) -> Sequence[float]:
    return [float(str(np.float32(number))) for number in numbers]


def _llama3(found: Metadata, rotated: int, theta: float) -> dict[str, Any]:
    """Llama 3's scaling from its factor for each frequency: 1 for short waves, the largest for long ones.

    Both bounds are 1 and 4 original lengths in every release; the original length is found from a wave
    between them, and is 8192 where there is none.
    """
    numbers = found.factors(ROPE_FACTORS[0], rotated // 2)
    factor, old, low, high = float(numbers.max()), 8192, 1.0, 4.0
    waves = 2 * np.pi * theta ** (np.arange(0, rotated, 2) / rotated)
    between = (numbers > 1.001) & (numbers < 0.999 * factor)
    if between.any():
        share = (1 / numbers[between] - 1 / factor) / (1 - 1 / factor)
        old = round(float(np.median(waves[between] * (low + share * (high - low)))))
    smooth = np.clip((old / waves - low) / (high - low), 0.0, 1.0)
    if not np.allclose(numbers, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise UnsupportedError(f"{found.path}: '{ROPE_FACTORS[0]}' is not the rope scaling of Llama 3")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": old,
    }
