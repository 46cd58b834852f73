"""Read a checkpoint's `config.json` so that mlx-lm computes the function transformers computes.

Transformers 5 writes `rope_parameters`; transformers 4 and mlx-lm read `rope_theta` and `rope_scaling`, and
fall back to a default without a word. `normalise` writes both styles, fills in the defaults where mlx-lm's
differ from transformers', and refuses what mlx-lm would silently compute otherwise. What differs by
architecture is in its row; what can be corrected in the modules, `mlx_adapters.models.corrections` corrects.
"""

import contextlib
import importlib
import inspect
import io
from typing import Any

from mlx_adapters.errors import CheckpointError, UnsupportedError
from mlx_adapters.models import fields as measured_fields
from mlx_adapters.models.architectures.row import Architecture, Config
from mlx_adapters.models.architectures.table import architecture
from mlx_adapters.models.corrections import corrected, ignored
from mlx_adapters.models.reference import reference
from mlx_adapters.models.rope import SCALED, original_length
from mlx_adapters.models.saved_forms import decoded

__all__ = ["classes", "normalise", "to_transformers"]

_LAYERS = 1000  # eight times the deepest published model
_NATIVE: dict[str, Config] = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
}


def normalise(config: Config) -> Config:
    """A copy of `config` that mlx-lm, transformers 4 and transformers 5 all read as the same function.

    Raises UnsupportedError naming the field that mlx-lm cannot honour, CheckpointError for a field that is
    missing or contradicts another. Applying it twice changes nothing.
    """
    config = decoded(config)
    if config.get("model_file"):
        raise UnsupportedError(
            "config.json: field 'model_file' asks to run code from the checkpoint; refused"
        )
    if config.get("transformers_weights"):
        raise UnsupportedError(
            "config.json: field 'transformers_weights' names weight files of its own, which is not read here"
        )
    _refuse_foreign_quantization(config)
    if isinstance(text := config.get("text_config"), dict):
        return _wrapper(config, text)
    row = architecture(config["model_type"])
    for field, other in row.variants:
        if config.get(field):
            config["model_type"], row = other, architecture(other)
    config = _formed(config, row)
    if row.file:
        _bound(config)
        config = _both_rope_styles(config, None)
        measured_fields.check(config)
        return config
    config = _renamed(config, row)
    _bound(config)
    fields = _accepted(config)
    for name, value in {**row.defaults, **measured_fields.defaults(config)}.items():
        config.setdefault(name, value)
    heads = config.get("num_attention_heads")
    if heads and "num_key_value_heads" in fields and config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads
    config = _both_rope_styles(config, fields)
    if measured_fields.measured(config["model_type"]):
        measured_fields.check(config)
    else:
        _refuse(config, fields, row)
    _require(config, fields)
    return config


def _wrapper(config: Config, text: Config) -> Config:
    """A model around a language model, whose configuration is `text`."""
    _bound(text)
    if "tie_word_embeddings" in config:  # the head is the outer model's, and transformers asks that
        text = text | {"tie_word_embeddings": config["tie_word_embeddings"]}
    if isinstance(text.get("model_type"), str):
        text = _language_model(text)
    if text.get("vocab_size") is not None:  # some model files look for it outside
        config = config | {"vocab_size": text["vocab_size"]}
    config = config | {"text_config": text}
    measured_fields.check(config)
    return config


def _language_model(text: Config) -> Config:
    """The configuration of a language model inside another: by its own rules where it has a model file."""
    row = architecture(text["model_type"])
    if not row.file:
        try:
            _plain_classes(text)
        except UnsupportedError:  # a part of another model file
            return _both_rope_styles(_renamed(_formed(text, row), row), None)
    return normalise(text)


def _renamed(config: Config, row: Architecture) -> Config:
    """`config` with fields that the model file reads under other names."""
    return config | {
        name: config[old]
        for old, name in row.renamed.items()
        if config.get(name) is None and config.get(old) is not None
    }


def _formed(config: Config, row: Architecture) -> Config:
    """`config` with what the model file reads where transformers 5 saves it otherwise."""
    for form in row.forms:
        config = config | form(config)
    return config


def to_transformers(config: Config) -> Config:
    """`config` as transformers 4 and 5 read it: both rope styles, and the type under both its names."""
    config = normalise(config)
    config["model_type"] = architecture(config["model_type"]).called or config["model_type"]
    dtype = config.get("dtype") or config.get("torch_dtype")
    return config | ({"dtype": dtype, "torch_dtype": dtype} if dtype else {})


def classes(config: Config) -> tuple[Any, Any]:
    """mlx-lm's (Model, ModelArgs) for `config`, corrected where mlx-lm ignores a field: for `load_model`."""
    return corrected(*_plain_classes(config), config, architecture(config["model_type"]))


def _plain_classes(config: Config) -> tuple[Any, Any]:
    from mlx_lm.utils import _get_classes

    row = architecture(config["model_type"])
    if row.own:
        module = importlib.import_module(f"mlx_adapters.models.{config['model_type']}")
        return module.Model, module.ModelArgs
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            model, args = _get_classes(config | ({"model_type": row.file} if row.file else {}))
        return model, _inside(args) if row.file else args
    except SystemExit:  # what mlx-lm's olmo does without a package of its own
        reason = " ".join(output.getvalue().split()) or "it gives no reason"
        raise UnsupportedError(
            f"config.json: field 'model_type' is {config['model_type']!r}, whose file in mlx-lm refuses to "
            f"load ({reason})"
        ) from None
    except ValueError:
        own = " Its own code (auto_map) is never run." if config.get("auto_map") else ""
        raise UnsupportedError(
            f"config.json: field 'model_type' is {config['model_type']!r}, which mlx-lm does not have.{own}"
        ) from None


def _inside(args: Any) -> Any:
    """The arguments of a wrapper's model file for a configuration of its language model alone."""

    class Args(args):
        @classmethod
        def from_dict(cls, params: Config) -> Any:
            inner = params if isinstance(params.get("text_config"), dict) else {"text_config": params}
            return args.from_dict({"model_type": params["model_type"]} | inner)

    return Args


def _bound(config: Config) -> None:
    """Cap the number of layers: modules are allocated before any weight is compared."""
    for name, value in config.items():
        # vocab_size_per_layer_input, for one, is no number of layers
        if "layer" in name and "per_layer" not in name and isinstance(value, int) and value > _LAYERS:
            raise CheckpointError(
                f"config.json: field {name!r} is {value}; at most {_LAYERS} layers are built"
            )


def _accepted(config: Config) -> dict[str, bool]:
    """The fields mlx-lm's ModelArgs reads, and whether each must be there."""
    _, args = _plain_classes(config)
    return {
        name: parameter.default is inspect.Parameter.empty
        for name, parameter in inspect.signature(args).parameters.items()
    }


# Rope ------------------------------------------------------------------------------------------------------


def _both_rope_styles(config: Config, fields: dict[str, bool] | None) -> Config:
    modern = config.get("rope_parameters")
    if isinstance(modern, dict) and any(isinstance(value, dict) for value in modern.values()):
        return _per_layer_type(config, modern, fields)
    rotary = {"rope_theta", "rotary_emb_base", "partial_rotary_factor"}
    stated = isinstance(modern, dict) or "rope_theta" in config
    if fields is not None and not fields.keys() & rotary and not stated:
        return config  # learned or fixed positions
    row = architecture(config["model_type"])
    modern = modern if isinstance(modern, dict) else {}
    old = config.get("rope_scaling") or {}
    if not isinstance(old, dict):
        raise CheckpointError(
            f"config.json: field 'rope_scaling' is {old!r}, and should be an object or null"
        )
    theta = _agreed(
        "rope_theta", modern.get("rope_theta"), config.get("rope_theta"), config.get("rotary_emb_base")
    )
    theta = theta if theta is not None else reference(config["model_type"]).theta
    part = _agreed(
        "partial_rotary_factor",
        modern.get("partial_rotary_factor"),
        config.get("partial_rotary_factor"),
        config.get("rotary_pct"),
    )
    part = part if part is not None else row.rotary_part
    scaling = _scaling({**old, **modern}, config)
    # how angles are shared among text and images: to transformers no kind of scaling
    shared = {name: value for name, value in {**old, **modern}.items() if name.startswith("mrope_")}
    written: Config = {
        "rope_scaling": scaling,
        "rope_parameters": scaling or {"rope_type": "default", **shared},
    }
    if theta is not None:
        written |= {
            "rope_theta": theta,
            "rope_parameters": written["rope_parameters"] | {"rope_theta": theta},
        }
    if part is not None:
        written["partial_rotary_factor"] = part
        written["rope_parameters"] = written["rope_parameters"] | {"partial_rotary_factor": part}
    by_type = reference(config["model_type"]).rotation == "by layer type"
    if row.scales_full_only or (fields is not None and by_type and "rope_parameters" not in fields):
        usual = reference(config["model_type"]).theta or 10000.0
        base = theta if row.scales_full_only else config.get("rope_local_base_freq", usual)
        local = {"rope_type": "default", "rope_theta": base}
        written["rope_parameters"] = {
            "full_attention": written["rope_parameters"],
            "sliding_attention": local,
        }
    if row.rotary_names:
        written |= zip(row.rotary_names, (theta, part), strict=True)
    return config | written


def _scaling(values: Config, config: Config) -> Config | None:
    """The scaling of the rotations as `rope_scaling` holds it; None when there is none."""
    kind = values.get("rope_type") or values.get("type") or "default"
    kind = "longrope" if kind == "su" else kind
    if kind == "default":
        return None
    others = {k: v for k, v in values.items() if k not in ("rope_theta", "partial_rotary_factor")}
    scaling = others | {"rope_type": kind, "type": kind}
    fixed = kind == "dynamic" and scaling.get("alpha")  # Hunyuan's, which does not depend on the text
    if kind not in SCALED and not fixed:
        raise UnsupportedError(
            f"config.json: field 'rope_scaling' is of type {kind!r}, which is not computed here. Supported: "
            f"{', '.join(SCALED)}"
        )
    if kind in ("yarn", "longrope", "llama3"):
        # transformers takes the model's length when the original one is not given; mlx-lm takes 4096
        scaling["original_max_position_embeddings"] = original_length(config, scaling)
    return scaling


def _per_layer_type(config: Config, modern: Config, fields: dict[str, bool] | None) -> Config:
    """Gemma 3's style: one set of rope parameters for each type of layer."""
    if fields is not None and "rope_parameters" in fields:
        return config
    full, local = modern.get("full_attention") or {}, modern.get("sliding_attention") or {}
    apart = reference(config["model_type"]).rotation == "by layer type"
    as_full = architecture(config["model_type"]).scales_full_only and (
        local.get("rope_type", "default") == "default" and local.get("rope_theta") == full.get("rope_theta")
    )
    if fields is not None and "rope_local_base_freq" not in fields and not (apart or as_full):
        raise UnsupportedError(
            "config.json: field 'rope_parameters' differs by layer type, which mlx-lm does not read for "
            f"model_type {config['model_type']!r}"
        )
    written: Config = {"rope_scaling": _scaling(full, config)}
    if full.get("rope_theta"):
        written["rope_theta"] = full["rope_theta"]
    reads = fields is None or "rope_local_base_freq" in fields
    if local.get("rope_theta") and reads and not as_full:
        written["rope_local_base_freq"] = local["rope_theta"]
    return config | written


def _agreed(name: str, *values: Any) -> Any:
    stated = [value for value in values if value is not None]
    if any(not isinstance(value, (int, float)) for value in stated):
        raise CheckpointError(f"config.json: field {name!r} is {stated!r}, and should be a number")
    if len(set(stated)) > 1:
        raise CheckpointError(
            f"config.json: field {name!r} is given as {' and as '.join(map(str, dict.fromkeys(stated)))}; "
            "make rope_parameters and the older fields agree"
        )
    return stated[0] if stated else None


# Refusals --------------------------------------------------------------------------------------------------


def _refuse(config: Config, fields: dict[str, bool], row: Architecture) -> None:
    kind = config["model_type"]
    whose = "our" if row.own else "mlx-lm's"
    for name, allowed in row.fixed.items():
        if config.get(name) not in allowed:
            raise ignored(name, config[name], f"{whose} {kind} always uses {allowed[-1]}")
    turned = reference(kind).rotation is not None  # `rope` corrects what mlx-lm does not read
    reads = {"rope_scaling", "rope_parameters"}
    if config.get("rope_scaling") and not turned and not fields.keys() & reads:
        raise ignored("rope_scaling", config["rope_scaling"], f"mlx-lm's {kind} ignores it")
    reads_theta = fields.keys() & {"rope_theta", "rotary_emb_base", "rope_parameters"}
    if not turned and not reads_theta and config.get("rope_theta", 10000) != 10000:
        raise ignored("rope_theta", config["rope_theta"], f"mlx-lm's {kind} always uses 10000")
    part = config.get("partial_rotary_factor")
    reads_part = fields.keys() & {"partial_rotary_factor", "rotary_pct", "rope_parameters"}
    if not reads_part and part not in (None, 1, 1.0):
        raise ignored("partial_rotary_factor", part, f"mlx-lm's {kind} always uses 1")
    heads, width, head_dim = (config.get(n) for n in ("num_attention_heads", "hidden_size", "head_dim"))
    if head_dim == config.get("qk_rope_head_dim"):
        head_dim = None  # transformers calls the rotated part so where it is projected by itself
    if heads and width and head_dim and "head_dim" not in fields and head_dim != width // heads:
        raise ignored("head_dim", head_dim, f"mlx-lm's {kind} always uses {width // heads}")
    if row.refuse:
        row.refuse(config)


def _refuse_foreign_quantization(config: Config) -> None:
    inner = config.get("text_config")
    sections = [part.get("quantization_config") for part in (config, inner) if isinstance(part, dict)]
    method = next((part["quant_method"] for part in sections if part and part.get("quant_method")), None)
    if method is None or config.get("quantization"):
        return
    if method not in _NATIVE:
        raise UnsupportedError(
            f"config.json: field 'quantization_config' is of method {method!r}, which is not read here; "
            "use the model's unquantized checkpoint and --bits"
        )
    config["quantization"] = _NATIVE[method]


def _require(config: Config, fields: dict[str, bool]) -> None:
    absent = [name for name, needed in fields.items() if needed and name not in config]
    if absent:
        raise CheckpointError(
            f"config.json: field {absent[0]!r} is missing; a {config['model_type']} model cannot be built "
            "without it"
        )
