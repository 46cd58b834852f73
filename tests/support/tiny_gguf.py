"""A GGUF file of a tiny llama, written by the gguf package."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="the reference needs the gguf package (extra: dev)")


HEADS, KV, HIDDEN, VOCAB = 4, 2, 64, 40


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order llama.cpp's converter gives the rows of q and k."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def tokens() -> tuple[list[str], list[int], list[str]]:
    letters = [chr(ord("a") + i) for i in range(26)]
    names = ["<unk>", "<s>", "</s>", *letters, "Ġ", "ab", "Ġa", "abc", "1", "2", "3"]
    names += [f"unused{i}" for i in range(VOCAB - len(names))]
    return names, [3, 3, 3] + [1] * (VOCAB - 3), ["a b", "Ġ a", "ab c"]


def write_tiny(path: Path, weights: dict[str, Any], *, kind: Any = None, **extra: Any) -> Path:
    """A GGUF file of a two-layer llama, written by the gguf package; `kind` quantizes the matrices."""
    arch = extra.pop("arch", "llama")
    writer = gguf.GGUFWriter(path, arch)
    for name, value in extra.pop("fields", {}).items():
        writer.add_key_value(name if "split" in name else f"{arch}.{name}", value, _type(value))
    for name, value in (
        ("block_count", 2),
        ("context_length", 128),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", 96),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", KV),
    ):
        writer.add_uint32(f"{arch}.{name}", extra.pop(name, value))
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{arch}.rope.freq_base", extra.pop("theta", 777.0))
    names, kinds, merges = tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(extra.pop("pre", "smollm"))
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(extra.pop("bos", 1))
    writer.add_eos_token_id(2)
    for end, add in (("eot", writer.add_eot_token_id), ("eom", writer.add_eom_token_id)):
        if end in extra:
            add(extra.pop(end))
    for name, array in weights.items():
        if kind is None or array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _type(value: Any) -> Any:
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32}
    return kinds.get(type(value), gguf.GGUFValueType.STRING)


def llama_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under GGUF's names, with q and k as in Hugging Face (not yet reordered)."""
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * 0.15).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.15 * random.standard_normal(HIDDEN)).astype(np.float32)

    weights = {"token_embd.weight": matrix(VOCAB, HIDDEN), "output_norm.weight": norm()}
    shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (32, HIDDEN), "attn_v": (32, HIDDEN)}
    shapes |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (96, HIDDEN), "ffn_up": (96, HIDDEN)}
    shapes |= {"ffn_down": (HIDDEN, 96)}
    for layer in range(2):
        weights |= {f"blk.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        weights |= {f"blk.{layer}.{name}.weight": norm() for name in ("attn_norm", "ffn_norm")}
    return weights


def as_written(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    heads = {"attn_q": HEADS, "attn_k": KV}
    return {
        name: next((permute(array, count) for part, count in heads.items() if f".{part}." in name), array)
        for name, array in weights.items()
    }
