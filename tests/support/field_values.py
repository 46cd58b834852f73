"""What to change in a configuration: the fields of its class and of mlx-lm's arguments, and values for each.

The names come from the classes, the values from a field's type, its name and what it is now. Nothing here is
about one architecture.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["ABSENT", "Case", "cases"]

Fields = dict[str, Any]

ABSENT = "(absent)"
"""The value of a field that config.json does not have: transformers takes its default."""

# Not about the function: ids, names, types, what is returned, initialisation and training
_NOT_ABOUT_IT = re.compile(
    r".*_token_(id|index)s?$|.*_tokens?_(start|end)$|.*(dropout|drop|pdrop)$|.*(dropout)_.*|initializer_.*|"
    r".*_initializer.*|.*_init(_.*)?$|output_.*|use_cache|.*(aux|z|balance)_loss.*|.*jitter.*|_.*|dtype|"
    r"torch_dtype|model_type|pretraining_tp|use_mamba_kernels|.*_grad_.*|rescale_prenorm_residual|"
    r"quantization.*|summary_.*|tokenizer_class|transformers_version|rope_parameters|rope_scaling"
)
# Another of these is another shape, and weights of another shape are refused when they are loaded
_SIZES = re.compile(
    r"(?!.*(window|chunk|block|group|head|expert)).*(size|rank)$|max_position_embeddings|num_(hidden_)?layers|"
    r"num_(attention|key_value)_heads|n_(head|layer|embd|positions|inner|ctx)"
)
_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2")
# Fields that hold one of a few words, by the last part of their names
_WORDS = {
    "scoring_func": ("softmax", "sigmoid"),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    "position_embedding_type": ("rope", "nope"),
    "experts_implementation": (),
}


@dataclass(frozen=True)
class Case:
    """One change: `label` of `value` in the table, made by `fields`; compared with the case `reference`
    (None: the base) to see whether it moves transformers. `drop` leaves that field out of config.json; `now`
    is the base's value, ... where it has none; `alias` another name of the field in config.json."""

    label: str
    value: Any
    fields: Fields
    reference: str | None = None
    drop: str | None = None
    now: Any = ...
    alias: str | None = None


def cases(config: Any, arguments: type) -> Iterator[Case]:
    """Every change of the base configuration `config`, transformers' or the part of it that is about text.

    `arguments` is mlx-lm's ModelArgs of the same model: a field that only it has may change ours alone.
    """
    from transformers import PreTrainedConfig

    aliases = config.attribute_map | {name: other for other, name in config.attribute_map.items()}
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)} | {"add_cross_attention_kwargs"}
    own = {field.name: field for field in dataclasses.fields(config)}
    known = own.keys() | config.attribute_map.keys() | set(config.attribute_map.values())
    theirs = {name: str(field.type) for name, field in own.items() if name not in general}
    signature = inspect.signature(arguments).parameters
    # an older name that transformers' class reads stands for a field that the base has already
    source = inspect.getsource(type(config))
    ours = {
        name: str(parameter.annotation)
        for name, parameter in signature.items()
        if name not in known and name not in general and not re.search(rf"\b{name}\b", source)
    }
    needed = {name for name, value in signature.items() if value.default is inspect.Parameter.empty}
    for name, kind in {**theirs, **ours}.items():
        if _NOT_ABOUT_IT.fullmatch(name) or _SIZES.fullmatch(name):
            continue
        now = _now(config, name)
        if name not in theirs and now is None:
            now = _default(arguments, name)
        for value in _values(name, kind, now, config):
            gates = _gates(name, value, config)
            yield Case(name, value, {name: value, **gates}, now=now, alias=aliases.get(name))
        if name in theirs:
            default = own[name].default
            sized = isinstance(default, int) and default > 16  # a size, or a model too large to try
            if (
                not sized
                and name not in needed
                and (default is None or isinstance(default, bool | int | float | str))
            ):
                yield Case(name, ABSENT, {name: default}, drop=name)
    yield from _ropes(config)


def _gates(name: str, value: Any, config: Any) -> Fields:
    """What else must be set for `name` to matter."""
    gate = f"use_{name}"
    gates: Fields = {gate: True} if value is not None and getattr(config, gate, None) is False else {}
    if getattr(config, "sliding_window", 0) is None and "sliding" in str((name, value)):
        gates |= {} if name == "sliding_window" else {"sliding_window": 5}
    return gates


def _now(config: Any, name: str, otherwise: Any = None) -> Any:
    try:
        return getattr(config, name, otherwise)
    except Exception:  # it has another value in every layer
        return otherwise


def _default(arguments: type, name: str) -> Any:
    default = inspect.signature(arguments).parameters[name].default
    return None if default is inspect.Parameter.empty or callable(default) else default


# Values of one field ---------------------------------------------------------------------------------------


def _values(name: str, kind: str, now: Any, config: Any) -> list[Any]:
    found = [value for value in _candidates(name, kind, now, config) if not _same(value, now)]
    return [value for index, value in enumerate(found) if not any(_same(value, v) for v in found[:index])]


def _same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and bool(left == right)


def _candidates(name: str, kind: str, now: Any, config: Any) -> list[Any]:
    absent = [None] if now is not None and "None" in kind else []
    if isinstance(now, bool) or (now is None and "bool" in kind):
        return [True, False]
    if isinstance(now, str) or (now is None and "str" in kind and "list" not in kind):
        return _texts(name, kind, now)
    if isinstance(now, list | tuple):
        return [*_lists(list(now)), *absent]
    if isinstance(now, dict):
        return []
    if now is None and "list" in kind:
        return _lists_for(name, config)
    if "window" in name or "chunk_size" in name:
        longest = _now(config, "max_position_embeddings")
        return [5, 9, *([longest] if longest else []), *absent]
    if isinstance(now, int) or (now is None and "int" in kind and "float" not in kind):
        return [*_whole(name, now), *absent]
    if isinstance(now, float) or (now is None and "float" in kind):
        return [*_real(name, now), *absent]
    return []


def _texts(name: str, kind: str, now: str | None) -> list[Any]:
    if name.endswith(("act", "activation", "act_fn", "activation_func", "activation_function")):
        return list(_ACTIVATIONS)
    literal = re.findall(r"'(\w+)'", kind) if "Literal" in kind else []
    words = next((words for end, words in _WORDS.items() if name.endswith(end)), ())
    return literal or list(words)


def _lists(now: list[Any]) -> list[Any]:
    if not now:
        return [[0], [1]]
    if all(isinstance(value, str) for value in now):
        found = [now[::-1], now[1:] + now[:1], *([kind] * len(now) for kind in dict.fromkeys(now))]
        other = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}
        return [*found, [other.get(kind, kind) for kind in now]]
    if all(isinstance(value, bool) or value in (0, 1) for value in now):
        return [now[::-1], [type(now[0])(not value) for value in now]]
    if all(isinstance(value, int | float) for value in now):
        return [[0.05, 0.2], [0.0, 0.1]] if len(now) == 2 else [[value * 0.5 for value in now], now[::-1]]
    return []


def _lists_for(name: str, config: Any) -> list[Any]:
    if "layer_types" in name:
        count = config.num_hidden_layers
        return [["full_attention", "sliding_attention"] * (count // 2) + ["full_attention"] * (count % 2)]
    return []


def _whole(name: str, now: int | None) -> list[Any]:
    if now is None:
        return [1, 2, 3, 8]
    if re.search(r"eps$|multiplier|scal", name):
        return [now + 2, max(1, now // 2), 3 * now + 1]
    if now > 12:
        return [2 * now]
    return [now + 1, now - 1, 2 * now] if now > 0 else [1, 2]


def _real(name: str, now: float | None) -> list[Any]:
    if name.endswith(("eps", "epsilon")):
        return [1e-12, 1e-8, 1e-6, 1e-5, 1e-2]
    if now is None or "cap" in name or "clip" in name or "limit" in name:
        return [0.1, 0.9, 2.5]
    return [now * 1.7 + 0.1, now * 0.6, 1.0, *([0.0] if "factor" not in name else [])]


# Rotary positions ------------------------------------------------------------------------------------------

# Of each kind of scaling: its fields, and changes of them. The originally longest text is shorter than ours.
_LENGTH = {"original_max_position_embeddings": 16}
_KINDS: dict[str, tuple[Fields, tuple[Fields, ...]]] = {
    "default": ({}, tuple({"partial_rotary_factor": part} for part in (0.25, 0.5, 0.75, 1.0))),
    "linear": ({"factor": 3.0}, ()),
    "dynamic": ({"factor": 3.0}, ()),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 200},
        (
            {"truncate": False},
            {"attention_factor": 1.3},
            {"beta_fast": 4.0},
            {"beta_slow": 3.0},
            {"mscale": 0.7, "mscale_all_dim": 0.4},
            {"mscale": 0.7},
            {"mscale_all_dim": 0.4},
        ),
    ),
    "llama3": ({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_LENGTH}, ()),
    "longrope": ({"factor": 4.0, **_LENGTH}, ({"attention_factor": 1.3},)),
}


# What an absent one is
_USUAL = {"truncate": True, "beta_fast": 32.0, "beta_slow": 1.0, "partial_rotary_factor": 1.0}


def _ropes(config: Any) -> Iterator[Case]:
    now = _now(config, "rope_parameters")
    if not isinstance(now, dict):
        return
    more: Fields = {}
    if _now(config, "head_dim", 0) is None:  # transformers' scaled ropes do not compute it
        more = {"head_dim": config.hidden_size // config.num_attention_heads}
    parts = {kind: values for kind, values in now.items() if isinstance(values, dict)}
    if not parts:
        for case in _rope("rope_scaling", now, config):
            yield _with_rope(case, case.fields, more)
        return
    for kind, values in parts.items():
        for case in _rope(f"rope_parameters.{kind}", values, config):
            yield _with_rope(case, {**now, kind: case.fields}, more)


def _with_rope(case: Case, rope: Fields, more: Fields) -> Case:
    short = {"max_position_embeddings": 16} if case.value == "dynamic" else {}
    return dataclasses.replace(case, fields={"rope_parameters": rope, **more, **short})


def _rope(label: str, now: Fields, config: Any) -> Iterator[Case]:
    theta = now.get("rope_theta") or 10000.0
    # a small base, with which every scaling changes the angles of a tiny head
    base = {**{name: now[name] for name in ("partial_rotary_factor",) if name in now}, "rope_theta": 777.0}
    for other in (theta * 3, 777.0, 10000.0):
        if other != theta:
            yield Case(f"{label}.rope_theta", other, {**now, "rope_theta": other}, now=theta)
    for kind, (fields, changes) in _KINDS.items():
        fields = {**base, "rope_type": kind, **fields}
        if kind == "longrope":
            yield from _longrope(label, fields, _rotated(config, now))
            fields |= dict.fromkeys(("short_factor", "long_factor"), _factors(_rotated(config, now), 1.0))
        yield Case(f"{label}.rope_type", kind, fields, now=now.get("rope_type", "default"))
        for change in changes:
            name, value = "+".join(change), next(iter(change.values()))
            changed, base_of_it = {**fields, **change}, f"{label}.rope_type {kind}"
            usual = _USUAL.get(name, ...)
            yield Case(f"{label}.{kind}.{name}", value, changed, base_of_it, now=usual)


def _longrope(label: str, fields: Fields, dims: int) -> Iterator[Case]:
    """Short factors that differ from the long ones, for a text that needs the long and one that needs the
    short ones."""
    two = {"short_factor": _factors(dims, 0.2), "long_factor": _factors(dims, 1.0)}
    for length in (16, 200):
        yield Case(
            f"{label}.rope_type", "longrope", {**fields, **two, "original_max_position_embeddings": length}
        )


def _factors(dims: int, step: float) -> list[float]:
    return [1.0 + step * index for index in range(dims // 2)]


def _rotated(config: Any, now: Fields) -> int:
    names = ("qk_rope_head_dim", "head_dim")
    width = next((_now(config, name) for name in names if _now(config, name)), None)
    width = width or config.hidden_size // config.num_attention_heads
    return int(width * now.get("partial_rotary_factor", 1.0))
