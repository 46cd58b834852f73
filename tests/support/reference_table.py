"""`python tests/support/reference_table.py --write`: make the table of what transformers' models read.

For every `model_type` that both libraries know: whether its rotations follow transformers' common formulas,
the field that names its activation, and which layers have windows when a configuration does not list them.
Asked of the configuration classes and of the text of the model files; no torch is needed.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import mlx_lm.models
import transformers
from mlx_lm.utils import MODEL_REMAPPING
from transformers import CONFIG_MAPPING

from mlx_adapters.models.reference import TABLE

_LAYERS = 24
_ACTIVATION = re.compile(r"ACT2FN\[(?:self\.)?config\.(\w+)\]")
_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")
_NAMES = ("gelu", "gelu_new", "silu", "relu")
_ALL_LAYERS = re.compile(r"create_causal_mask if self\.config\.sliding_window is None")


def scanned() -> dict[str, Any]:
    """The table, made anew."""
    files = {path.stem for path in Path(mlx_lm.models.__path__[0]).glob("*.py")}
    inner = {f"{name}_text" for name in files}
    names = sorted((files | inner | set(MODEL_REMAPPING)) & set(CONFIG_MAPPING))
    models = {name: facts for name in names if (facts := _facts(name))}
    return {"transformers": transformers.__version__, "models": models}


def _facts(name: str) -> dict[str, Any]:
    cls = CONFIG_MAPPING[name]
    folder = Path(sys.modules[cls.__module__].__file__ or "").parent
    text = "".join(file.read_text(encoding="utf-8") for file in sorted(folder.glob("modeling_*.py")))
    usual = cls()
    facts: dict[str, Any] = {}
    if "ROPE_INIT_FUNCTIONS" in text:
        facts["rotation"] = "by layer type" if 'f"{layer_type}_inv_freq"' in text else "formula"
        facts["theta"] = cls.default_theta if isinstance(cls.default_theta, float) else None
    if "short_mscale" in text:
        facts["mscales"] = True
    if "(config.time_step_min, float(" in text:
        facts["time_step"] = "floor"
    elif "config.time_step_limit" in text:
        facts["time_step"] = "limit"
    named = set(_ACTIVATION.findall(text))
    field = next((f for f in _FIELDS if f in named and isinstance(getattr(usual, f, None), str)), None)
    if field:
        facts["activation"] = [field, getattr(usual, field)]
        read = {name: getattr(cls(**{field: name}), field) for name in _NAMES}
        if misnamed := {name: other for name, other in read.items() if name != other}:
            facts["misnamed"] = misnamed
    named_so = hasattr(usual, "sliding_window") and "sliding_window" not in cls.attribute_map
    if not named_so or "create_sliding_window_causal_mask" not in text:
        return facts
    if window := _window(cls, bool(_ALL_LAYERS.search(text))):
        facts["window"] = window
    return facts


def _window(cls: Any, everywhere: bool) -> dict[str, Any] | None:
    asked: dict[str, Any] = {"sliding_window": 16, "num_hidden_layers": _LAYERS}
    switched = hasattr(cls(), "use_sliding_window")
    if switched:
        asked["use_sliding_window"] = True
    if hasattr(cls(), "max_window_layers"):
        asked["max_window_layers"] = 8
    types = None if everywhere else getattr(cls(**asked), "layer_types", None)
    layers = _pattern(types)
    return {"default": cls().sliding_window, "switched": switched, "layers": layers} if layers else None


def _pattern(types: list[str] | None) -> str | None:
    """`all`; `upper`, from max_window_layers on; `lower`, every other one below it; or a period: `sssf`."""
    if types is None:
        return "all"
    letters = "".join("s" if kind == "sliding_attention" else "f" for kind in types)
    if letters == "f" * 8 + "s" * (_LAYERS - 8):
        return "upper"
    if letters == "sf" * 4 + "f" * (_LAYERS - 8):
        return "lower"
    # the last layer of some is always full
    periods = (letters[:size] for size in range(1, 9))
    return next((p for p in periods if (p * _LAYERS)[: _LAYERS - 1] == letters[:-1]), None)


if __name__ == "__main__":
    table = json.dumps(scanned(), indent=1) + "\n"
    if "--write" in sys.argv:
        TABLE.write_text(table, encoding="utf-8")
    else:
        sys.stdout.write(table)
