"""Which fields of a configuration act here as they do in transformers: a table made by changing each of them.

`python tests/support/field_scan.py --write`, in the repository, makes the table: every field of a tiny random
model is changed, and the logits of transformers and ours are compared. A test scans again.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from mlx_adapters.errors import UnsupportedError
from mlx_adapters.files.documents import from_json

__all__ = ["TABLE", "check", "defaults", "ignored", "measured", "remark", "silent", "table"]

Config = dict[str, Any]

TABLE = Path(__file__).with_name("fields.json")
"""`models`: {model_type: what its fields do}; `not compared`: model_types that transformers and mlx-lm have
and the table has not; `versions` of the two.

Of a model_type: `alike`, the fields that move transformers' logits and ours to the same values; `idle`, those
that move neither; `fields`, the values tried of the others, by what they did here: "right", "refused" (by an
UnsupportedError), "error" or "wrong"; `aliases`, other names of these in config.json; `defaults`, the values
that transformers gives fields without which ours would be other logits; `base`, why nothing was compared."""


def check(config: Config) -> None:
    """UnsupportedError for a field of a normalised configuration whose value was not right when it was tried
    here, or was not tried while another value of it was wrong."""
    entry, text = _entry(config)
    for label, values in entry.get("fields", {}).items():
        if not silent(values):
            continue
        for name, value in _stated(label, text, entry.get("aliases", {}).get(label)):
            if not _right(name, value, values, text):
                right = ", ".join(map(repr, values.get("right", []))) or "no value that was tried"
                why = f"{config['model_type']} here equals transformers for {right} only"
                raise ignored(name, value, why)
    heads, width, head_dim = (text.get(n) for n in ("num_attention_heads", "hidden_size", "head_dim"))
    tried = entry.get("fields", {}).get("head_dim", {})
    derived = "error" in tried and sum(one is not None for one in tried.get("right", [])) <= 1
    if derived and heads and width and head_dim not in (None, width // heads):
        raise ignored("head_dim", head_dim, f"{config['model_type']} here always uses {width // heads}")


def ignored(name: str, value: Any, why: str) -> UnsupportedError:
    """The error for a field that the model file would silently ignore."""
    return UnsupportedError(
        f"config.json: field {name!r} is {value!r}, but {why}: the results would be silently wrong; refused"
    )


def measured(model_type: str) -> bool:
    """Whether the table knows what the fields of `model_type` do."""
    return "base" not in table()["models"].get(model_type, {"base": "not tried"})


def defaults(config: Config) -> Config:
    """transformers' values of fields that config.json leaves out and ours would fill in otherwise."""
    entry, _ = _entry(config)
    found: Config = entry.get("defaults", {})
    return found


def remark(model_type: str) -> str | None:
    """What a user must be told of a model_type whose fields were not compared; None where they were, or where
    there is nothing to compare with."""
    found = table()
    if model_type in found["not compared"] or "base" in found["models"].get(model_type, {}):
        return f"{model_type} was not compared with transformers, field by field; check with --verify"
    return None


def silent(values: dict[str, list[Any]]) -> list[Any]:
    """Of the values tried of a field, those that would be computed otherwise without a word, and those that
    end in an error which would not name the field. A size that does not fit the weights does."""
    lists = any(isinstance(value, list) for tried in values.values() for value in tried)
    errors = [v for v in values.get("error", []) if not _is_number(v) and not (lists and v is None)]
    return [*values.get("wrong", []), *errors]


@cache
def table() -> dict[str, Any]:
    """The table as it is shipped."""
    found: dict[str, Any] = from_json(TABLE.read_text(encoding="utf-8"))
    return found


def _entry(config: Config) -> tuple[dict[str, Any], Config]:
    """The entry for a configuration, and the part of it about text."""
    models, text = table()["models"], config.get("text_config")
    if not isinstance(text, dict):
        return models.get(config["model_type"], {}), config
    entry = models.get(config["model_type"])
    return entry or models.get(text.get("model_type"), {}), text


def _stated(label: str, config: Config, alias: str | None) -> Iterator[tuple[str, Any]]:
    """(field, value) of what a label of the table names, where the configuration has it."""
    place, _, name = label.rpartition(".")
    if not place:
        for field in (label, alias) if config.get(f"use_{label}") is not False else ():
            if field in config:
                yield field, config[field]
        return
    part, _, kind = place.rpartition(".") if name not in ("rope_type", "rope_theta") else (place, "", "")
    field, _, layers = part.partition(".")
    values = config.get(field)
    if layers:
        values = values.get(layers) if isinstance(values, dict) else None
    values = values if isinstance(values, dict) else {}
    if not layers:  # these two stand next to `rope_scaling`
        values = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")} | values
    now = values.get("rope_type") or values.get("type") or "default"
    names = name.split("+")
    if name == "rope_type":
        yield f"{part}.{name}", now
    elif kind in ("", "default", now) and all(values.get(one) is not None for one in names):
        group = {"mscale", "mscale_all_dim"} if set(names) & {"mscale", "mscale_all_dim"} else set(names)
        if {one for one in group if values.get(one) is not None} == set(names):
            yield f"{part}.{names[0]}", values[names[0]]


def _right(name: str, value: Any, values: dict[str, list[Any]], config: Config) -> bool:
    """Whether a value is known to be right, from those tried."""
    right, wrong = values.get("right", []), silent(values)
    if any(_equal(value, one) for one in right):
        return True
    if any(_equal(value, one) for one in wrong):
        return _is_number(value) and "window" in name and _never_left(value, config)
    if value is None or isinstance(value, dict):
        return True  # as if it were not there
    if isinstance(value, list):
        return _shape(value) not in {_shape(one) for one in wrong if isinstance(one, list)}
    if _is_number(value):
        if "window" in name and _never_left(value, config):
            return True
        tried = sorted((one, one in right) for one in [*right, *wrong] if _is_number(one))
        below, above = [ok for one, ok in tried if one < value], [ok for one, ok in tried if one > value]
        return bool(tried) and all([*below[-1:], *above[:1]])
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _never_left(window: float, config: Config) -> bool:
    """Whether a window is at least as long as any text."""
    longest = config.get("max_position_embeddings")
    return isinstance(longest, int) and window >= longest


def _shape(values: list[Any]) -> str:
    """What two lists for models of different depths have in common."""
    if not values:
        return "empty"
    if all(value == values[0] for value in values):
        return f"all {values[0]}" if isinstance(values[0], str | bool) else "not empty"
    if not isinstance(values[0], str):
        return "not empty"
    period = next(
        p for p in range(1, len(values) + 1) if all(v == values[i % p] for i, v in enumerate(values))
    )
    repeats = 2 * period <= len(values) or values[:-1] == values[:1] * (len(values) - 1)
    return "repeated" if repeats else "other"


def _equal(left: Any, right: Any) -> bool:
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)
