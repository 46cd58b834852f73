"""Layers that see only the last tokens, as transformers finds them, in every model that has them.

What mlx-lm's files do with a window is asked of the caches that they make: a layer with a window has a
rotating one. Where that differs from what the configuration says, the block makes its own mask, and caches
are whole.
"""

import inspect
from typing import Any

import mlx.core as mx

from mlx_adapters.errors import UnsupportedError
from mlx_adapters.models.architectures.row import Config
from mlx_adapters.models.masks import create_attention_mask
from mlx_adapters.models.reference import Window, reference
from mlx_adapters.rebind import replace_call

__all__ = ["correct_windows", "layer_types", "letters", "pattern"]

SLIDING, FULL = "sliding_attention", "full_attention"


def layer_types(config: Config) -> list[str]:
    """The type of every layer as transformers sees it; empty where its model has no types."""
    about, count = reference(config["model_type"]).window, config.get("num_hidden_layers") or 0
    stated = config.get("layer_types")
    if isinstance(stated, list) and all(isinstance(kind, str) for kind in stated):
        return stated
    return _usual(about, config, count) if about else []


def _usual(about: Window, config: Config, count: int) -> list[str]:
    from_layer = config.get("max_window_layers")
    from_layer = 28 if from_layer is None else from_layer
    if about.layers == "all":
        slides = [True] * count
    elif about.layers == "upper":
        slides = [index >= from_layer for index in range(count)]
    elif about.layers == "lower":
        slides = [index < from_layer and index % 2 == 0 for index in range(count)]
    else:
        period = config.get("sliding_window_pattern")
        kinds = about.layers
        if isinstance(period, str) and period:
            kinds = period.replace("L", "s")  # EXAONE 4 writes LLLG
        elif isinstance(period, int) and period > 0:
            kinds = "s" * (period - 1) + "f"
        slides = [kinds[index % len(kinds)] == "s" for index in range(count)]
    return [SLIDING if slide else FULL for slide in slides]


def windows(config: Config) -> list[int | None]:
    """The window in tokens of every layer, None where a layer sees all; empty for models without windows."""
    about, count = reference(config["model_type"]).window, config.get("num_hidden_layers") or 0
    if about is None:
        return []
    size = config.get("sliding_window", about.default)
    if about.switched and not config.get("use_sliding_window"):
        size = None
    if not size or size >= (config.get("max_position_embeddings") or float("inf")):
        return [None] * count  # there is none, or it is never left
    types = [SLIDING] * count if about.layers == "all" else layer_types(config)
    return [size if kind == SLIDING else None for kind in types]


def pattern(config: Config) -> int | None:
    """The period of the full layers, where `layer_types` is a repetition of sliding ones and a full one: how
    older model files state it. UnsupportedError where `layer_types` is something else."""
    types = config.get("layer_types")
    if not isinstance(types, list) or not types:
        return None
    last = next((index for index, kind in enumerate(types) if kind == FULL), len(types))
    period = last + 1
    if last == len(types) or types != [
        FULL if (index + 1) % period == 0 else SLIDING for index in range(len(types))
    ]:
        raise UnsupportedError(
            f"config.json: field 'layer_types' is no repetition of {last} sliding layers and a full one, and "
            f"mlx-lm's {config['model_type']} computes nothing else"
        )
    return period


def letters(config: Config) -> str | None:
    """L for each layer with a window and G for each without, as EXAONE 4's file states them; None where there
    are no windows at all. One more letter stands for a layer that is not there: the file looks for both."""
    size = config.get("sliding_window")
    if not size:
        return None
    written = "".join("L" if kind == SLIDING else "G" for kind in layer_types(config))
    return written + "".join({"L", "G"} - set(written))


def correct_windows(model: Any, config: Config) -> None:
    """Give every block of `model` the window that transformers gives it for `config`."""
    wanted = windows(config)
    layers = list(model.layers)
    built = _built(model, config)
    if not len(wanted) == len(layers) == len(built) or wanted == built:
        return
    for layer, window, has in zip(layers, wanted, built, strict=True):
        if window != has:
            layer.__class__ = _masked(type(layer), window)
    model.__class__ = _whole_caches(type(model))


def _built(model: Any, config: Config) -> list[int | None]:
    """The window of every layer as mlx-lm's file has it, by the caches that it makes."""
    if not hasattr(model, "make_cache"):
        return [None] * len(model.layers)
    limit = config.get("max_position_embeddings") or float("inf")
    sizes = [getattr(cache, "max_size", None) for cache in model.make_cache()]
    return [size if size and size < limit else None for size in sizes]


def _whole_caches(base: Any) -> type:
    """A model whose caches keep what a window hides: the masks hide it."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    def make_cache(self: Any) -> list[Any]:
        caches = base.make_cache(self) if hasattr(base, "make_cache") else [KVCache() for _ in self.layers]
        return [KVCache() if isinstance(cache, RotatingKVCache) else cache for cache in caches]

    return type(base.__name__, (base,), {"make_cache": make_cache})


def _masked(base: Any, window: int | None) -> type:
    """A block that sees the last `window` tokens, or all of them: it makes its own mask."""
    signature = inspect.signature(base.__call__)

    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, x, *args, **kwargs)
        cache = given.arguments.get("cache")
        past = _length(cache)
        if window is None or past is None or past + x.shape[1] > window:
            mask = create_attention_mask(x, cache, window_size=window, return_array=True)
            given.arguments["mask"] = mask
        return base.__call__(*given.args, **given.kwargs)

    return replace_call(base, call)


def _length(cache: Any) -> int | None:
    """Tokens in the cache, if that is known without asking the device."""
    if cache is None:
        return 0
    for name in ("_idx", "offset"):
        value = getattr(cache, name, None)
        if isinstance(value, int):
            return value
    return None
