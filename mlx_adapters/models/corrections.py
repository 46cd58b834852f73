"""Corrections to mlx-lm's models where a config field changes the function and mlx-lm does not read it.

Each correction edits the modules right after mlx-lm has built them and before the weights are loaded: the
parameters keep their names. The row of an architecture names those that it needs. A field that cannot be
corrected raises UnsupportedError.
"""

import inspect
import re
from collections.abc import Container, Mapping
from typing import Any, get_args

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.models.activations import correct_activations
from mlx_adapters.models.architectures.row import Architecture, Config
from mlx_adapters.models.attention import attention
from mlx_adapters.models.attention import rebind as rebind_attention
from mlx_adapters.models.corrected_routers import correct_groups
from mlx_adapters.models.fields import ignored, measured
from mlx_adapters.models.reference import reference
from mlx_adapters.models.rope import correct_rotations
from mlx_adapters.models.state_space import limit_time_steps
from mlx_adapters.models.windows import correct_windows, letters, pattern
from mlx_adapters.rebind import replace_call

__all__ = [
    "cap_in_blocks",
    "clip_projections",
    "corrected",
    "count_expert_layers",
    "drop_attention_biases",
    "forget_absent_kinds",
    "gpt2_names",
    "ignored",
    "mask_blocks_causally",
    "norm_factors_exactly",
    "refuse_chatglm2_ratio",
    "rotate_part",
    "scale_attention",
    "scale_by_one",
    "scale_embeddings_exactly",
    "shorten_window",
]

# Fields that say whether a block's layers have biases, and where in the tree these layers are.
_BIASES = {"attention_bias": "attn|attention", "mlp_bias": "mlp|feed_forward|ffn"}


def corrected(model: Any, args: Any, config: Config, row: Architecture) -> tuple[Any, Any]:
    """`model` and `args` (mlx-lm's classes), subclassed to honour what `config` says."""

    class Args(args):
        @classmethod
        def from_dict(cls, params: Config) -> Any:
            params = _as_built(params, inspect.signature(args).parameters, row)
            try:
                return args.from_dict(params)
            except ValueError:  # a scaling that the model file does not know, and `rope` does
                if not params.get("rope_scaling") or not reference(params["model_type"]).rotation:
                    raise
                return args.from_dict(params | {"rope_scaling": None})

    class Model(model):
        def __init__(self, values: Any) -> None:
            nn.Module.__init__(self)  # mlx-lm's recurrent_gemma forgets it, and cannot be frozen then
            super().__init__(values)
            _refuse_lost_biases(self, config, inspect.signature(args).parameters)
            _correct(self, config, row)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            if row.rename_weights:
                weights = row.rename_weights(weights)
            if row.fold_weights:
                weights = row.fold_weights(weights, config)
            kept = _kept(weights, row)
            return (super().sanitize(weights) if hasattr(super(), "sanitize") else weights) | kept

    Model.__name__ = Model.__qualname__ = model.__name__
    Model.__module__ = model.__module__
    return Model, Args


def _refuse_lost_biases(model: Any, config: Config, fields: Container[str]) -> None:
    """UnsupportedError for biases that the config has and the model, which does not read the field, has not.

    Some model files do not read it because they always have them. Where the fields were compared with
    transformers, `fields` knows.
    """
    if measured(config["model_type"]):
        return
    for field, place in _BIASES.items():
        if not config.get(field) or field in fields:
            continue
        layers = [m for path, m in model.named_modules() if re.search(place, path) and "weight" in m]
        if not any("bias" in layer and layer.weight.ndim > 1 for layer in layers):
            raise ignored(field, config[field], f"mlx-lm's {config['model_type']} has no such biases")


def _as_built(params: Config, fields: Mapping[str, inspect.Parameter], row: Architecture) -> Config:
    """The configuration from which mlx-lm's file builds the modules that are right, or can be corrected."""
    if row.as_built:
        params = row.as_built(params)
    types, about = params.get("layer_types"), reference(params["model_type"])
    if about.rotation:  # a field of mlx-lm's alone: which numbers are turned together is the architecture's
        params = {name: value for name, value in params.items() if name != "rope_traditional"}
    if not isinstance(types, list):
        return params
    if about.window is None and about.rotation == "formula" and "sliding_attention" in types:
        return params | {"layer_types": None}  # transformers' llama has no windows, mlx-lm's has
    if about.window and about.window.layers == "all":
        return params | {"layer_types": None}  # transformers' mistral does not read them
    if "layer_types" in fields or "sliding_window_pattern" not in fields:
        return params
    if str in get_args(fields["sliding_window_pattern"].annotation):
        return params | {"sliding_window_pattern": letters(params)}
    return params | {"sliding_window_pattern": pattern(params)}


def _kept(weights: dict[str, mx.array], row: Architecture) -> dict[str, mx.array]:
    """The tensors that mlx-lm drops and a correction needs, flat, by their names here."""
    found = {}
    for name, array in weights.items():
        for expression, kept in row.kept:
            if match := re.fullmatch(expression, name):
                found[match.expand(kept)] = array.reshape(-1)
    return found


def _correct(model: Any, config: Config, row: Architecture) -> None:
    text = config
    if isinstance(inner := config.get("text_config"), dict) and isinstance(inner.get("model_type"), str):
        text = inner
    if row.ungated and row.widths:
        for layer in model.layers:
            _resize(layer.mlp, config, row.ungated, *row.widths)
    for correction in row.corrections:
        correction(model, config)
    correct_activations(model, text)
    correct_rotations(model, text)
    correct_windows(model, text)
    rebind_attention(model)  # for every model: the blocks with windows make masks for it alone
    limit_time_steps(model, text)
    correct_groups(model, text)


# Widths of the MLP ------------------------------------------------------------------------------------------


def _resize(mlp: Any, config: Config, names: tuple[str, str], inner: str, width: str) -> None:
    inner_width, model_width = config.get(inner), config[width]
    if inner_width and inner_width != 4 * model_width:
        setattr(mlp, names[0], nn.Linear(model_width, inner_width))
        setattr(mlp, names[1], nn.Linear(inner_width, model_width))


# Attention -------------------------------------------------------------------------------------------------


def scale_attention(model: Any, config: Config) -> None:
    """GPT-2: the scores' scale as the configuration says, by the layer's number if it asks for that."""
    for index, layer in enumerate(model.layers):
        if config.get("scale_attn_weights") is False:
            layer.attn.scale = 1.0
        if config.get("scale_attn_by_inverse_layer_idx"):
            layer.attn.scale /= index + 1


def cap_in_blocks(model: Any, config: Config) -> None:
    """Gemma 2: scores with a soft cap, by the attention that keeps none of them and takes masks of each row.

    mlx-lm's attention keeps all scores, and would apply the mask of row n to kv head n of every row: its
    scores are [rows, kv heads, queries of each, time, keys]."""
    for layer in model.layers:
        layer.self_attn.__class__ = _capping(type(layer.self_attn))


def _capping(base: Any) -> type:
    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        rows, time, _ = x.shape
        queries, keys, values = (
            part(x).reshape(rows, time, heads, -1).transpose(0, 2, 1, 3)
            for part, heads in (
                (self.q_proj, self.n_heads),
                (self.k_proj, self.n_kv_heads),
                (self.v_proj, self.n_kv_heads),
            )
        )
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        cap = self.attn_logit_softcapping
        seen = attention(queries, keys, values, cache, self.scale, mask, cap=cap)
        result: mx.array = self.o_proj(seen.transpose(0, 2, 1, 3).reshape(rows, time, -1))
        return result

    return replace_call(base, call)


def forget_absent_kinds(model: Any, config: Config) -> None:
    """EXAONE 4: no mask for a kind of layers that there is none of."""
    inner, count = model.model, len(model.layers)
    if inner.swa_idx is not None and inner.swa_idx >= count:
        inner.swa_idx = None
    if inner.full_idx >= count:
        inner.full_idx = 0


def norm_factors_exactly(model: Any, config: Config) -> None:
    """GLM-4 MoE Lite: the norms between attention's low-rank factors add 1e-6, whatever `rms_norm_eps` is."""
    for layer in model.layers:
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if name in layer.self_attn:
                layer.self_attn[name].eps = 1e-6


def mask_blocks_causally(model: Any, config: Config) -> None:
    """Phi-3-small: the boolean mask that mlx-lm makes as a mask. mlx-lm's block-sparse layers add it to the
    scores as 1 and 0, and see what comes later."""
    for layer in model.layers:
        layer.self_attn.__class__ = _causal(type(layer.self_attn))


def _causal(base: Any) -> type:
    def attend(self: Any, queries: Any, keys: Any, values: Any, scale: Any, mask: Any) -> mx.array:
        if isinstance(mask, mx.array) and mask.dtype == mx.bool_:
            mask = mx.where(mask, 0.0, -mx.inf).astype(queries.dtype)
            mask = mask if mask.ndim == 2 else mask[:, None]  # scores: [rows, kv heads, queries of each, ..]
        result: mx.array = base._block_sparse_attention(self, queries, keys, values, scale, mask)
        return result

    return type(base.__name__, (base,), {"_block_sparse_attention": attend})


def rotate_part(model: Any, config: Config) -> None:
    """GLM: rotates the part of each head that the configuration says."""
    for layer in model.layers:
        dims = int(layer.self_attn.head_dim * config["partial_rotary_factor"])
        layer.self_attn.rope = nn.RoPE(dims, traditional=True, base=config.get("rope_theta", 10000))


def drop_attention_biases(model: Any, config: Config) -> None:
    """GPT-NeoX: no biases in attention where the configuration says so; mlx-lm always has them."""
    if config.get("attention_bias") is not False:
        return
    for layer in model.layers:
        for name in ("query_key_value", "dense"):
            rows, columns = layer.attention[name].weight.shape
            setattr(layer.attention, name, nn.Linear(columns, rows, bias=False))


def shorten_window(model: Any, config: Config) -> None:
    """PLaMo 3: mlx-lm's mask reaches one token further back than its cache, and than PLaMo's own code."""
    model.model.layers.window_size -= 1


def scale_embeddings_exactly(model: Any, config: Config) -> None:
    """Gemma 3: embeddings times sqrt(width) in the precision of the computation, as transformers has it.
    mlx-lm rounds that root to bfloat16 always: for Gemma 3 270M 25.25 instead of 25.298."""
    model.model.__class__ = _exactly_scaled(type(model.model))


def _exactly_scaled(base: Any) -> type:
    def call(self: Any, inputs: mx.array, cache: Any = None, input_embeddings: Any = None) -> mx.array:
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        root = self.args.hidden_size**0.5
        rounded = mx.array(root, mx.bfloat16).astype(h.dtype)
        return base.__call__(self, inputs, cache, h * (mx.array(root).astype(h.dtype) / rounded))

    return replace_call(base, call)


def clip_projections(model: Any, config: Config) -> None:
    """OLMoE: queries, keys and values within +-`clip_qkv`, which mlx-lm does not read."""
    if (limit := config.get("clip_qkv")) is None:
        return
    for layer in model.layers:
        layer.self_attn.__class__ = _clipping(type(layer.self_attn), float(limit))


def _clipping(base: Any, limit: float) -> type:
    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        rows, time, _ = x.shape
        projected = (self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x))
        queries, keys, values = (
            mx.clip(part, -limit, limit).reshape(rows, time, heads, -1).transpose(0, 2, 1, 3)
            for part, heads in zip(projected, (self.n_heads, self.n_kv_heads, self.n_kv_heads), strict=True)
        )
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        seen = attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        result: mx.array = self.o_proj(seen.transpose(0, 2, 1, 3).reshape(rows, time, -1))
        return result

    return replace_call(base, call)


# What a model file builds from a configuration -------------------------------------------------------------


def count_expert_layers(config: Config) -> Config:
    """Jamba: experts in every layer whose number leaves `expert_layer_offset`; mlx-lm adds the offset to the
    number where it should take it off."""
    period, offset = config["expert_layer_period"], config["expert_layer_offset"]
    return config | {"expert_layer_offset": -offset % period}


def scale_by_one(config: Config) -> Config:
    """DeepSeek-V2: rotations without scaling, which mlx-lm's file always has."""
    return (
        config if config.get("rope_scaling") else config | {"rope_scaling": {"type": "yarn", "factor": 1.0}}
    )


# What the configuration of one architecture says and its model file cannot ---------------------------------


def refuse_chatglm2_ratio(config: Config) -> None:
    """ChatGLM2's long-context release: UnsupportedError. It reads `rope_ratio` otherwise than that of
    ChatGLM3, and only their names tell them apart."""
    name = str(config.get("_name_or_path") or "").lower()
    if config.get("rope_ratio", 1) != 1 and "chatglm2" in name:
        why = "ChatGLM2 divides positions by it, and ChatGLM3 does not"
        raise ignored("rope_ratio", config["rope_ratio"], why)


# The names of tensors --------------------------------------------------------------------------------------


def gpt2_names(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """GPT-2: names without `transformer.` in front. mlx-lm knows only those of the first release."""
    named = {name.removeprefix("transformer."): array for name, array in weights.items()}
    tied = ("lm_head.weight",)
    return {n: a for n, a in named.items() if n not in tied and not n.endswith(".attn.masked_bias")}
