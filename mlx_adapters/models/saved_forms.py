"""Configurations as transformers 5 saves them, and as the models were published: what a model file of mlx-lm
reads from either.

A form is a function from a configuration to the fields that the model file wants and the configuration says
under another name, in another shape, or not at all because transformers always computes them so. It changes
no field that transformers reads otherwise. The row of an architecture names its forms.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_adapters.errors import UnsupportedError
from mlx_adapters.models.architectures.row import Config

__all__ = [
    "apertus_constants",
    "decoded",
    "encoded",
    "exaone_window_letters",
    "expanded_width",
    "four_times_wide",
    "gemma4_full_layers",
    "layer_names",
    "lfm2_width",
    "linear_interval",
    "minimax_m2_rotations",
    "refuse_lightning_attention",
    "rotations_as_stated",
    "sliding_pattern",
    "sparse_layers",
]

_TAG = "__float__"
_FULL = "full_attention"


# Numbers that JSON has not ---------------------------------------------------------------------------------


def decoded(value: Any) -> Any:
    """`value` with the numbers that transformers 5 writes as `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        if set(value) == {_TAG} and value[_TAG] in ("Infinity", "-Infinity", "NaN"):
            return float(value[_TAG])
        return {name: decoded(inner) for name, inner in value.items()}
    return [decoded(inner) for inner in value] if isinstance(value, list) else value


def encoded(value: Any) -> Any:
    """The inverse of `decoded`: infinite numbers as transformers 5 and mlx-lm write them."""
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: str(value).replace("inf", "Infinity").replace("nan", "NaN")}
    if isinstance(value, dict):
        return {name: encoded(inner) for name, inner in value.items()}
    return [encoded(inner) for inner in value] if isinstance(value, list | tuple) else value


# Kinds of layers -------------------------------------------------------------------------------------------


def sliding_pattern(config: Config) -> Config:
    """Gemma 3, Cohere 2: `layer_types` with a full layer at every nth place is `sliding_window_pattern` n.

    Any other order is left as it is: the pattern cannot say it.
    """
    return _interval(config, "sliding_window_pattern")


def linear_interval(config: Config) -> Config:
    """Qwen 3-Next and 3.5: `layer_types` with full attention at every nth place is an interval of n.

    Raises UnsupportedError for another order, which the model file cannot build.
    """
    found = _interval(config, "full_attention_interval")
    if config.get("layer_types") and not found:
        raise UnsupportedError(
            "config.json: field 'layer_types' has full attention at irregular places; mlx-lm builds it at "
            "every nth layer only"
        )
    return found


def _interval(config: Config, name: str) -> Config:
    kinds = config.get("layer_types")
    if not kinds:
        return {}
    # where no layer is full, an interval longer than the model says so
    interval = kinds.index(_FULL) + 1 if _FULL in kinds else len(kinds) + 1
    regular = all((kind == _FULL) == ((index + 1) % interval == 0) for index, kind in enumerate(kinds))
    return {name: interval} if regular else {}


def exaone_window_letters(config: Config) -> Config:
    """EXAONE 4: the kinds of its layers as `sliding_window_pattern`'s letters, L for a window and G for none.

    transformers writes their period as a number, and nothing where no layer has a window.
    """
    found: Config = {"rope_scaling": config.get("rope_scaling")}
    if not config.get("sliding_window"):
        return found | {"sliding_window": None, "sliding_window_pattern": None}
    if kinds := config.get("layer_types"):
        found["sliding_window_pattern"] = _period("".join("G" if kind == _FULL else "L" for kind in kinds))
    elif isinstance(number := config.get("sliding_window_pattern", 4), int):
        found["sliding_window_pattern"] = "L" * (number - 1) + "G"
    return found


def _period(letters: str) -> str:
    """The shortest beginning that gives `letters` when it is repeated."""
    return next(
        letters[:length]
        for length in range(1, len(letters) + 1)
        if (letters[:length] * len(letters))[: len(letters)] == letters
    )


def layer_names(names: Mapping[str, str]) -> Callable[[Config], Config]:
    """The form that gives `layer_types` the names of the published models, {transformers 5's: theirs}, which
    transformers reads as well."""

    def form(config: Config) -> Config:
        kinds: Sequence[str] = config.get("layer_types") or []
        return {"layer_types": [names.get(kind, kind) for kind in kinds]}

    return form


def rotations_as_stated(config: Config) -> Config:
    """Granite 4: without a `position_embedding_type` there are no rotations."""
    return {"position_embedding_type": config.get("position_embedding_type") or "nope"}


def sparse_layers(config: Config) -> Config:
    """EXAONE MoE: which layers have experts, from `mlp_layer_types` or the number of those that have none."""
    kinds = config.get("mlp_layer_types")
    if kinds:
        return {"is_moe_layer": [kind == "sparse" for kind in kinds]}
    first, count = config.get("first_k_dense_replace"), config.get("num_hidden_layers") or 0
    if first is None or "is_moe_layer" in config:
        return {}
    return {"is_moe_layer": [index >= first for index in range(count)]}


def gemma4_full_layers(config: Config) -> Config:
    """Gemma 4: what full layers have otherwise, from `per_layer_config`, under the names of the release.

    Raises UnsupportedError where layers of a kind differ among themselves, or in another field.
    """
    kinds, by_layer = config.get("layer_types"), config.get("per_layer_config")
    if not isinstance(by_layer, dict) or not kinds:
        return {}
    own = {int(index): fields for index, fields in by_layer.items()}
    full = [own.get(index, {}) for index, kind in enumerate(kinds) if kind == _FULL]
    sliding = [own.get(index, {}) for index, kind in enumerate(kinds) if kind != _FULL]
    known = {"head_dim", "num_key_value_heads"}
    if any(sliding) or any(fields != full[0] or set(fields) - known for fields in full):
        raise UnsupportedError(
            "config.json: field 'per_layer_config' gives layers of one kind different sizes, or sizes other "
            "than head_dim and num_key_value_heads, which mlx-lm does not build"
        )
    stated = full[0] if full else {}
    heads = stated.get("num_key_value_heads")
    if heads not in (None, config.get("num_key_value_heads")) and not config.get("attention_k_eq_v"):
        raise UnsupportedError(
            "config.json: field 'per_layer_config' gives full layers other key and value heads, which mlx-lm "
            "builds only with attention_k_eq_v"
        )
    return {
        "global_head_dim": stated.get("head_dim", config.get("head_dim")),
        "num_global_key_value_heads": heads,
    }


# Sizes and constants ---------------------------------------------------------------------------------------


def lfm2_width(config: Config) -> Config:
    """LFM2: the convolutions are as wide as the model, which only the published configurations say."""
    return {"block_dim": config["hidden_size"]} if "hidden_size" in config else {}


def expanded_width(config: Config) -> Config:
    """Mamba 2: the width inside a block is `expand` times the model's."""
    if "hidden_size" not in config:
        return {}
    return {"intermediate_size": int(config.get("expand", 2) * config["hidden_size"])}


def four_times_wide(config: Config) -> Config:
    """GPT-BigCode: an MLP without `n_inner` is four times as wide as the model."""
    if config.get("n_inner") is not None or "n_embd" not in config:
        return {}
    return {"n_inner": 4 * config["n_embd"]}


def apertus_constants(config: Config) -> Config:
    """Apertus: what transformers computes without a field for it."""
    constants = {"mlp_bias": False, "post_norm": False, "qk_norm": True}
    return {name: config.get(name, value) for name, value in constants.items()}


def minimax_m2_rotations(config: Config) -> Config:
    """MiniMax M2: the rotated part of a head as a number of dimensions; no shared expert."""
    found: Config = {"shared_intermediate_size": config.get("shared_intermediate_size", 0)}
    rope, head_dim = config.get("rope_parameters") or {}, config.get("head_dim") or 128
    part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return {"rotary_dim": int(head_dim * part)} | found if "rotary_dim" not in config else found


def refuse_lightning_attention(config: Config) -> Config:
    """MiniMax-Text-01: UnsupportedError. mlx-lm's model file of that name is MiniMax M2's."""
    kinds = config.get("layer_types") or config.get("attn_type_list") or []
    if "linear_attention" in kinds or 0 in kinds or "block_size" in config:
        raise UnsupportedError(
            "config.json: field 'layer_types' has lightning attention (MiniMax-Text-01), which mlx-lm does "
            "not compute: its file of that name is for MiniMax M2"
        )
    return {}
