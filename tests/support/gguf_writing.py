"""Write a checkpoint of transformers as the GGUF file that llama.cpp's converter makes of it.

Names of tensors and of metadata are those of the gguf package (its map of names, its writer's methods); what
the converter does to values is written here from its rules. `MLX_ADAPTERS_LLAMA_CPP` names a checkout of
llama.cpp whose own converter is run instead (`converted_by_llama_cpp`).
"""

import contextlib
import importlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from gguf_writing_fields import metadata, vocabulary
from tiny_gguf import gguf, permute

__all__ = ["ARCHS", "converted_by_llama_cpp", "write_gguf"]

Config = dict[str, Any]
Tensors = dict[str, np.ndarray]
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")

ARCHS = {
    "llama": "llama",
    "mixtral": "llama",
    "mistral": "mistral3",
    "ministral3": "mistral3",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "gpt_oss": "gpt-oss",
    "lfm2": "lfm2",
    "lfm2_moe": "lfm2moe",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "granitemoehybrid": "granitehybrid",
    "glm4": "glm4",
    "glm4_moe": "glm4moe",
    "olmo2": "olmo2",
    "seed_oss": "seed_oss",
    "phi3": "phi3",
}
"""{model_type: architecture of llama.cpp}."""
_TURNED = ("llama", "mistral3", "smollm3", "granite", "granitemoe", "granitehybrid")


def write_gguf(source: Path, file: Path, *, kind: Any = None) -> Path:
    """Write the folder `source` as `file`; `kind` quantizes the matrices whose rows it divides."""
    config, weights = _read(source)
    arch = ARCHS[config["model_type"]]
    writer = gguf.GGUFWriter(file, arch)
    metadata(writer, arch, config)
    vocabulary(writer, config["vocab_size"])
    names = gguf.get_tensor_name_map(_enum(arch), config["num_hidden_layers"])
    for name, array in _changed(arch, weights, config):
        base, dot, ending = name.rpartition(".")
        mapped = name if ".scale" in name else names.get_name(name, (".weight", ".bias"))
        assert mapped, f"the gguf package has no name for {base}{dot}{ending} of {arch}"
        array = np.ascontiguousarray(array, dtype=np.float32)
        if (
            kind is not None
            and array.ndim > 1
            and array.shape[-1] % _block(kind) == 0
            and "conv" not in mapped
        ):
            writer.add_tensor(mapped, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(mapped, array)
    for name, factors in _factors(arch, config).items():
        writer.add_tensor(f"{name}.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _block(kind: Any) -> int:
    return int(gguf.GGML_QUANT_SIZES[kind][0])


def _enum(arch: str) -> Any:
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)


def _read(source: Path) -> tuple[Config, Tensors]:
    """The language model's configuration and its tensors, with the matrices of experts in stacks."""
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text())
    config = config | config.get("text_config", {})
    weights: Tensors = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, array in load_file(source / "model.safetensors").items():
        if "vision" in name or "visual" in name or "projector" in name:
            continue
        name = name.replace("language_model.model.", "model.").replace("model.language_model.", "model.")
        if found := _EXPERT.match(name.removeprefix("language_model.")):
            stacks.setdefault(f"{found[1]}.{found[3]}.weight", {})[int(found[2])] = array
        else:
            weights[name.removeprefix("language_model.")] = array
    return config, weights | {name: np.stack([s[i] for i in sorted(s)]) for name, s in stacks.items()}


# Values ----------------------------------------------------------------------------------------------------


def _changed(arch: str, weights: Tensors, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads")}
    rule: Callable[[str, np.ndarray, Config], Iterator[tuple[str, np.ndarray]]] = _RULES.get(arch, _as_it_is)
    for name, array in weights.items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings", False):
            continue
        part = name.split(".")[-2]
        if arch in _TURNED and part in heads:
            array = permute(array[:, None] if array.ndim == 1 else array, heads[part]).reshape(array.shape)
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        if "block_sparse_moe.experts.w" in name and arch == "llama":
            name = name.replace("model.layers.", "layers.").replace("block_sparse_moe", "feed_forward")
        yield from rule(name, array, config)


def _as_it_is(name: str, array: np.ndarray, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    yield name, array


def _plus_one(name: str, array: np.ndarray, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    yield name, array + 1 if name.endswith("norm.weight") else array


def _tiled(array: np.ndarray, config: Config, width: int, axis: int = 0) -> np.ndarray:
    """The heads of values: the first of each head of keys, then the second of each."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    heads = np.split(array, values, axis=axis)
    assert heads[0].shape[axis] == width
    order = [key * (values // keys) + turn for turn in range(values // keys) for key in range(keys)]
    return np.concatenate([heads[index] for index in order], axis=axis)


def _qwen35(name: str, array: np.ndarray, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    width = config["linear_value_head_dim"]
    first = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    if "in_proj_qkv." in name or "conv1d" in name:
        array = np.concatenate([array[:first], _tiled(array[first:], config, width)])
    elif "in_proj_z" in name:
        array = _tiled(array, config, width)
    elif any(part in name for part in ("in_proj_a", "in_proj_b", "A_log", "dt_bias")):
        array = _tiled(array, config, 1)
    elif "linear_attn.out_proj" in name:
        array = _tiled(array, config, width, axis=1)
    yield from _qwen3next(name, array, config)


def _qwen3next(name: str, array: np.ndarray, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    if name.endswith("A_log"):
        array = -np.exp(array)
    elif name.endswith("dt_bias"):
        name = name.replace("dt_bias", "dt_proj.bias")
    elif "conv1d" in name:
        array = array[:, 0]
    elif name.endswith("norm.weight") and "linear_attn" not in name:
        array = array + 1
    if name.endswith("experts.gate_up_proj"):
        for part, half in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
            yield name.replace("gate_up_proj", f"{part}_proj.weight"), half
    elif "in_proj_qkvz" in name:
        yield from _split_by_kind(name, array, config)
    else:
        yield f"{name}.weight" if name.endswith("experts.down_proj") else name, array


def _split_by_kind(name: str, array: np.ndarray, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """One matrix of queries, keys, values and gates by head as two, by kind."""
    keys, width = config["linear_num_key_heads"], config["linear_key_head_dim"]
    value = config["linear_num_value_heads"] // keys * config["linear_value_head_dim"]
    by_head = array.reshape(keys, 2 * (width + value), -1)
    kinds = np.split(by_head, np.cumsum([width, width, value]), axis=1)
    flat = [kind.reshape(-1, array.shape[1]) for kind in kinds]
    block = name.split(".")[2]
    yield f"blk.{block}.attn_qkv.weight", np.concatenate(flat[:3])
    yield f"blk.{block}.attn_gate.weight", flat[3]


def _gpt_oss(name: str, array: np.ndarray, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    if "experts." not in name:
        yield name + ".weight" if name.endswith("sinks") else name, array
        return
    ending = "bias" if name.endswith("_bias") else "weight"
    array = array if ending == "bias" else array.swapaxes(1, 2)
    stem = name.rpartition(".")[0]
    if "gate_up" not in name:
        yield f"{stem}.down_proj.{ending}", array
        return
    yield f"{stem}.gate_proj.{ending}", array[:, 0::2]
    yield f"{stem}.up_proj.{ending}", array[:, 1::2]


def _gemma4(name: str, array: np.ndarray, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    block = name.split(".")[2] if ".layers." in name else ""
    if name.endswith("router.scale"):
        name = f"blk.{block}.ffn_gate_inp.scale"
    elif name.endswith("per_expert_scale"):
        name = f"blk.{block}.ffn_down_exps.scale"
    elif name.endswith(("layer_scalar", "gate_up_proj", "experts.down_proj")):
        name += ".weight"
    yield name, array


def _lfm2(name: str, array: np.ndarray, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    if "conv.conv" in name:
        array = array[:, 0]
    if ".experts.w" in name:
        name = name.removeprefix("model.")
    yield name.replace("expert_bias", "expert_bias.bias"), array


def _granite(name: str, array: np.ndarray, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    block = name.split(".")[2] if ".layers." in name else ""
    if name.endswith("A_log"):
        array = -np.exp(array)[:, None]
    elif name.endswith("mamba.D"):
        array = array[:, None]
    elif name.endswith("mamba.norm.weight"):
        array = array.reshape(config["mamba_n_groups"], -1)
    elif name.endswith("conv1d.weight"):
        array = array[:, 0]
    elif name.endswith("input_linear.weight"):
        kind = "shexp" if "shared" in name else "exps"
        for part, half in zip(("gate", "up"), np.split(array, 2, axis=-2), strict=True):
            yield f"blk.{block}.ffn_{part}_{kind}.weight", half
        return
    yield name.replace("dt_bias", "dt_proj.bias"), array


_RULES: dict[str, Any] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), _plus_one),
    **dict.fromkeys(("qwen35", "qwen35moe"), _qwen35),
    "qwen3next": _qwen3next,
    "gpt-oss": _gpt_oss,
    "gemma4": _gemma4,
    **dict.fromkeys(("lfm2", "lfm2moe"), _lfm2),
    **dict.fromkeys(("granitemoe", "granitehybrid"), _granite),
}


def _factors(arch: str, config: Config) -> Tensors:
    """The tensors that hold the factors of rotations."""
    rope = config.get("rope_parameters") or {}
    if arch == "gemma4":
        full = rope["full_attention"]["partial_rotary_factor"]
        width = max([own.get("head_dim", 0) for own in config["per_layer_config"].values()])
        rotated = int(width * full / 2)
        return {"rope_freqs": np.array([1.0] * rotated + [1e30] * (width // 2 - rotated))}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{kind}": np.array(rope[f"{kind}_factor"]) for kind in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    width = config["head_dim"]
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    turns = rope["original_max_position_embeddings"] / waves
    share = np.clip(
        (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"]), 0, 1
    )
    return {"rope_freqs": 1 / ((1 - share) / rope["factor"] + share)}


# llama.cpp's converter -------------------------------------------------------------------------------------


def converted_by_llama_cpp(checkout: Path, source: Path, file: Path) -> Path:
    """Run the converter of a checkout of llama.cpp, with the gguf package of that checkout, in this process.

    The vocabulary is not compared: a pre-tokenizer that the converter knows stands in for the tiny one's.
    """
    paths = [str(checkout), str(checkout / "gguf-py")]
    with patch.object(sys, "path", [*paths, *sys.path]), patch.dict(sys.modules), _quiet():
        for name in [name for name in sys.modules if name.split(".")[0] in ("gguf", "conversion")]:
            del sys.modules[name]
        package, own = importlib.import_module("gguf"), importlib.import_module("conversion")
        base = importlib.import_module("conversion.base")
        fields = own.ModelBase.load_hparams(source, False)
        kind = own.get_model_class(own.get_model_architecture(fields, own.ModelType.TEXT))
        with (
            patch.object(base.TextModel, "get_vocab_base_pre", lambda self, tokenizer: "qwen2"),
            patch.object(kind, "set_vocab", base.TextModel._set_vocab_gpt2),
            patch.object(kind, "no_mtp", True, create=True),
        ):
            model = kind(source, package.LlamaFileType.ALL_F32, file)
            model = getattr(model, "impl", model)
            with patch.object(type(model), "set_vocab", base.TextModel._set_vocab_gpt2):
                model.write()
    return file


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
