"""Corrections to mlx-lm's models where a config field changes the function and mlx-lm does not read it.

Each correction edits the modules right after mlx-lm has built them and before the weights are loaded: the
parameters keep their names. A field that cannot be corrected raises UnsupportedError.
"""

import inspect
import re
from collections.abc import Callable, Container
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import UnsupportedError

__all__ = ["OWN_PARTIAL", "activation", "corrected"]

Config = dict[str, Any]
Activation = Callable[[mx.array], mx.array]

_ACTIVATIONS: dict[str, tuple[str, Activation]] = {
    "silu": ("silu", nn.silu),
    "swish": ("silu", nn.silu),
    "gelu": ("gelu", nn.gelu),
    "gelu_python": ("gelu", nn.gelu),
    "gelu_new": ("tanh", nn.gelu_approx),
    "gelu_fast": ("tanh", nn.gelu_approx),
    "gelu_pytorch_tanh": ("tanh", nn.gelu_approx),
    "relu": ("relu", nn.relu),
    "relu2": ("relu2", nn.relu2),
}

# model_type -> (field, transformers' default, what mlx-lm computes whatever the field says)
_USED: dict[str, tuple[str, str, str]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "granite", "cohere", "stablelm"),
        ("hidden_act", "silu", "silu"),
    ),
    "mixtral": ("hidden_act", "silu", "silu"),
    "gemma": ("hidden_act", "gelu_pytorch_tanh", "gelu"),
    "gemma2": ("hidden_activation", "gelu_pytorch_tanh", "tanh"),
    "gpt2": ("activation_function", "gelu_new", "tanh"),
    "gptj": ("activation_function", "gelu_new", "tanh"),
    "gpt_neox": ("hidden_act", "gelu", "tanh"),
    "gpt_bigcode": ("activation_function", "gelu_pytorch_tanh", "gelu"),
    "starcoder2": ("hidden_act", "gelu_pytorch_tanh", "gelu"),
    "phi": ("hidden_act", "gelu_new", "tanh"),
}
# The two linear layers of an ungated MLP, and the fields that hold its width and the model's.
_UNGATED = {
    "gpt2": ("c_fc", "c_proj"),
    "gpt_bigcode": ("c_fc", "c_proj"),
    "starcoder2": ("c_fc", "c_proj"),
    "gptj": ("fc_in", "fc_out"),
    "gpt_neox": ("dense_h_to_4h", "dense_4h_to_h"),
    "phi": ("fc1", "fc2"),
}
_WIDTHS = {
    "gpt2": ("n_inner", "n_embd"),
    "gptj": ("n_inner", "n_embd"),
    "gpt_neox": ("intermediate_size", "hidden_size"),
}
# Fields that say whether a block's layers have biases, and where in the tree these layers are.
_BIASES = {"attention_bias": "attn|attention", "mlp_bias": "mlp|feed_forward|ffn"}
# mlx-lm rotates whole heads here, whatever part of them the config says.
OWN_PARTIAL = ("glm",)


def corrected(model: Any, args: Any, config: Config) -> tuple[Any, Any]:
    """`model` and `args` (mlx-lm's classes), subclassed to honour what `config` says."""
    windowed = _windowed_layers(config)

    class Args(args):
        @classmethod
        def from_dict(cls, params: Config) -> Any:
            # with every layer windowed mlx-lm's own mixture finds no full layer; ours below needs none
            if all(windowed) and windowed and config["model_type"] == "mistral":
                params = params | {"layer_types": None}
            return args.from_dict(params)

    class Model(model):
        def __init__(self, values: Any) -> None:
            nn.Module.__init__(self)  # mlx-lm's recurrent_gemma forgets it, and cannot be frozen then
            super().__init__(values)
            _refuse_lost_biases(self, config, inspect.signature(args).parameters)
            _correct(self, config, windowed)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            if config["model_type"] == "gpt2":
                weights = _gpt2_names(weights)
            return super().sanitize(weights) if hasattr(super(), "sanitize") else weights

    Model.__name__ = Model.__qualname__ = model.__name__
    Model.__module__ = model.__module__
    return Model, Args


def _gpt2_names(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    # mlx-lm knows only the names of the first release, which had no `transformer.` in front
    named = {name.removeprefix("transformer."): array for name, array in weights.items()}
    tied = ("lm_head.weight",)
    return {n: a for n, a in named.items() if n not in tied and not n.endswith(".attn.masked_bias")}


def _refuse_lost_biases(model: Any, config: Config, fields: Container[str]) -> None:
    """UnsupportedError for biases that the config has and the model, which does not read the field, has not.

    Some model files do not read it because they always have them.
    """
    for field, place in _BIASES.items():
        if not config.get(field) or field in fields:
            continue
        layers = [m for path, m in model.named_modules() if re.search(place, path) and "weight" in m]
        if not any("bias" in layer and layer.weight.ndim > 1 for layer in layers):
            raise UnsupportedError(
                f"config.json: field {field!r} is {config[field]!r}, but mlx-lm's {config['model_type']} has "
                "no such biases: the results would be silently wrong; refused"
            )


def _correct(model: Any, config: Config, windowed: list[bool]) -> None:
    kind = config["model_type"]
    if kind == "gemma3_text":
        model.model.__class__ = _exactly_scaled(type(model.model))
    if kind == "plamo3":  # its mask reaches one token further back than its cache, and than PLaMo's own code
        model.model.layers.window_size -= 1
    for index, layer in enumerate(model.layers):
        if kind in _WIDTHS:
            _resize(layer.mlp, config, _UNGATED[kind], *_WIDTHS[kind])
        if kind in _USED:
            _activate(layer, config)
        if kind in OWN_PARTIAL:
            _rotate_part(layer.self_attn, config)
        if kind == "gpt2":
            _scale(layer.attn, config, index)
        if kind == "phi3small":
            layer.self_attn.__class__ = _causal(type(layer.self_attn))
        if kind == "gemma2" and layer.self_attn.repeats > 1:
            layer.self_attn.__class__ = _masked_by_row(type(layer.self_attn))
        if kind == "gpt_neox" and config.get("attention_bias") is False:
            for name in ("query_key_value", "dense"):
                _without_bias(layer.attention, name)
        if index < len(windowed) and windowed[index]:
            layer.__class__ = _windowed(type(layer), config["sliding_window"])


# Activations and widths of the MLP -------------------------------------------------------------------------


def _activate(layer: Any, config: Config) -> None:
    kind = config["model_type"]
    field, default, computed = _USED[kind]
    name = config.get(field) or default
    if kind == "gemma" and name == "gelu":
        name = "gelu_pytorch_tanh"  # transformers reads the first Gemma configs so: a known mistake in them
    family, function = _activation(field, name)
    if family == computed:
        return
    mlp = getattr(layer, "mlp", None)
    if kind in _UNGATED:
        mlp.__class__ = _ungated(type(mlp), *_UNGATED[kind], function)
    elif mlp is not None and all(part in mlp for part in ("gate_proj", "up_proj", "down_proj")):
        mlp.__class__ = _gated(type(mlp), function)
    else:
        raise UnsupportedError(
            f"config.json: field {field!r} is {name!r}, but mlx-lm's {kind} uses {computed}"
        )


def activation(config_field: str, name: str) -> Activation:
    """The function of an activation's name in a config; UnsupportedError names the field."""
    return _activation(config_field, name)[1]


def _activation(config_field: str, name: str) -> tuple[str, Activation]:
    if name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"config.json: field {config_field!r} is {name!r}, which is not implemented in MLX here"
        )
    return _ACTIVATIONS[name]


def _gated(base: type, function: Activation) -> type:
    def call(self: Any, x: mx.array) -> mx.array:
        return self.down_proj(function(self.gate_proj(x)) * self.up_proj(x))

    return type(base.__name__, (base,), {"__call__": call})


def _ungated(base: type, up: str, down: str, function: Activation) -> type:
    def call(self: Any, x: mx.array) -> mx.array:
        return self[down](function(self[up](x)))

    return type(base.__name__, (base,), {"__call__": call})


def _resize(mlp: Any, config: Config, names: tuple[str, str], inner: str, width: str) -> None:
    wanted, model_width = config.get(inner), config[width]
    if wanted and wanted != 4 * model_width:
        setattr(mlp, names[0], nn.Linear(model_width, wanted))
        setattr(mlp, names[1], nn.Linear(wanted, model_width))


# Attention -------------------------------------------------------------------------------------------------


def _scale(attention: Any, config: Config, index: int) -> None:
    if config.get("scale_attn_weights") is False:
        attention.scale = 1.0
    if config.get("scale_attn_by_inverse_layer_idx"):
        attention.scale /= index + 1


def _masked_by_row(base: type) -> type:
    """Gemma 2's attention with masks [rows, 1, time, keys]. Its scores are [rows, kv heads, queries of each,
    time, keys]: mlx-lm's would apply the mask of row n to kv head n of every row."""

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if isinstance(mask, mx.array) and mask.ndim == 4:
            mask = mask[:, :, None]
        return base.__call__(self, x, mask, cache)

    return type(base.__name__, (base,), {"__call__": call})


def _causal(base: Any) -> type:
    """Phi-3-small's attention with the boolean mask that mlx-lm makes as a mask: mlx-lm's block-sparse layers
    add it to the scores as 1 and 0, and see what comes later."""

    def attend(self: Any, queries: Any, keys: Any, values: Any, scale: Any, mask: Any) -> mx.array:
        if isinstance(mask, mx.array) and mask.dtype == mx.bool_:
            mask = mx.where(mask, 0.0, -mx.inf).astype(queries.dtype)
            mask = mask if mask.ndim == 2 else mask[:, None]  # scores: [rows, kv heads, queries of each, ..]
        result: mx.array = base._block_sparse_attention(self, queries, keys, values, scale, mask)
        return result

    return type(base.__name__, (base,), {"_block_sparse_attention": attend})


def _rotate_part(attention: Any, config: Config) -> None:
    dims = int(attention.head_dim * config["partial_rotary_factor"])
    attention.rope = nn.RoPE(dims, traditional=True, base=config.get("rope_theta", 10000))


def _exactly_scaled(base: type) -> type:
    """Gemma 3's blocks with embeddings times sqrt(width) in the precision of the computation, as transformers
    has it. mlx-lm rounds that root to bfloat16 always: for Gemma 3 270M 25.25 instead of 25.298."""

    def call(self: Any, inputs: mx.array, cache: Any = None, input_embeddings: Any = None) -> mx.array:
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        root = self.args.hidden_size**0.5
        rounded = mx.array(root, mx.bfloat16).astype(h.dtype)
        return base.__call__(self, inputs, cache, h * (mx.array(root).astype(h.dtype) / rounded))

    return type(base.__name__, (base,), {"__call__": call})


def _without_bias(parent: Any, name: str) -> None:
    rows, columns = parent[name].weight.shape
    setattr(parent, name, nn.Linear(columns, rows, bias=False))


def _windowed_layers(config: Config) -> list[bool]:
    """Which layers see only the last `sliding_window` tokens in transformers and all of them in mlx-lm."""
    kind, window = config["model_type"], config.get("sliding_window")
    count = config.get("num_hidden_layers") or 0
    if not window or kind not in ("mistral", "mixtral", "qwen2", "qwen3", "gemma2", "phi3", "starcoder2"):
        return []
    if window >= (config.get("max_position_embeddings") or float("inf")):
        return []  # the window is never left
    types = config.get("layer_types")
    if kind in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
        return []
    if kind == "mistral" and types and "full_attention" in types:
        return []  # mlx-lm's llama mixes the two itself
    if types:
        return [layer == "sliding_attention" for layer in types]
    if kind in ("qwen2", "qwen3"):
        return [index >= config.get("max_window_layers", 28) for index in range(count)]
    if kind == "gemma2":
        return [index % 2 == 0 for index in range(count)]
    return [True] * count


def _windowed(base: type, window: int) -> type:
    """A decoder block that masks what lies `window` or more tokens back."""
    from mlx_lm.models.base import create_attention_mask

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        past = _length(cache)
        if past is None or past + x.shape[1] > window:
            mask = create_attention_mask(x, cache, window_size=window, return_array=True)
        return base.__call__(self, x, mask, cache)

    return type(base.__name__, (base,), {"__call__": call})


def _length(cache: Any) -> int | None:
    """Tokens in the cache, if that is known without asking the device."""
    if cache is None:
        return 0
    for name in ("_idx", "offset"):
        value = getattr(cache, name, None)
        if isinstance(value, int):
            return value
    return None
