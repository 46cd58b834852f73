"""PEFT's adapter_config.json read with care: by what is known to be right, not by what is known to be wrong.

A field that a method does not name in its `PEFT_FIELDS` belongs to a PEFT that came later, or to a feature
that is not here. It passes when its value says nothing (null, false, empty) and is refused by name otherwise.
"""

import re
from collections.abc import Mapping
from typing import Any

from mlx_adapters.errors import AdapterError

__all__ = ["COMMON", "Fields", "Known", "check_fields", "is_target"]

Fields = dict[str, Any]
"""An `adapter_config.json`, read or to be written."""
Known = Mapping[str, tuple[Any, ...] | None]
"""Fields -> the values that are read right, or change nothing; None for all values."""

COMMON: Known = {
    "peft_type": None,
    "task_type": ("CAUSAL_LM",),
    "peft_version": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": None,
    "fan_in_fan_out": None,  # how PyTorch keeps the base's matrix; the adapter's tensors are the same
    # the file's tensors say which layers there are, and are compared with these
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
}
_OTHER_MODELS = re.compile(r"For(Sequence|Token|Image|Audio)Classification|ForQuestionAnswering")


def check_fields(fields: Fields, known: Known) -> None:
    """AdapterError for a field that would make the adapter another function than is read here."""
    task = fields.get("task_type")
    made_for = str((fields.get("auto_mapping") or {}).get("base_model_class"))
    if task not in (None, "CAUSAL_LM") or _OTHER_MODELS.search(made_for):
        found = f"task_type={task!r}" if task else f"auto_mapping names a {made_for}"
        raise AdapterError(f"{found}: the adapter is for another kind of model than a language model")
    for name, value in fields.items():
        if value in (None, False, "", [], {}):
            continue
        if name not in known:
            raise AdapterError(
                f"{name}={_short(value)} is not supported: with it the adapter may be another function than "
                "is read here. If it concerned the training alone, set it to null"
            )
        allowed = known[name]
        if allowed is not None and value not in allowed:
            raise AdapterError(_wrong(name, value))


def _wrong(name: str, value: Any) -> str:
    if name == "init_lora_weights":
        return (
            f"init_lora_weights={_short(value)} may have taken the adapter's start out of the base's "
            "weights: save it in PEFT as plain LoRA first (path_initial_model_for_weight_conversion)"
        )
    return f"{name}={_short(value)} is not supported, and without it the adapter is another function"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_target(fields: Fields, path: str) -> bool:
    """Whether PEFT adapts the module at a Hugging Face path, by the configuration's own rule; AdapterError
    where it holds a pattern that is none."""
    try:
        return _is_target(fields, path)
    except re.error as error:
        raise AdapterError(
            f"a pattern among its target_modules is not a regular expression: {error}"
        ) from None


def _is_target(fields: Fields, path: str) -> bool:
    chosen = fields.get("target_modules")
    if not chosen or _named(fields.get("exclude_modules"), path):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in fields.get("modules_to_save") or ()):
        return False
    if isinstance(chosen, str) or path in chosen:
        return _named(chosen, path)
    numbers = fields.get("layers_to_transform")
    if not _named(chosen, path) or numbers in (None, []):
        return _named(chosen, path)
    patterns = fields.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path):
            return int(found[1]) in (numbers if isinstance(numbers, list) else [numbers])
    return False


def _named(names: Any, path: str) -> bool:
    """A text is a pattern for the whole path; a list holds ends of paths."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names or ())
