"""How transformers calls the tensors of a checkpoint: the table that the wheel ships, asked of transformers.

python tests/support/torch_names.py --write     asks for every family of `families.py`, and writes the table
python tests/support/torch_names.py             prints it
"""

import argparse
import json
import re
import tempfile
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import Any

import tiny
import torch
from families import FAMILIES, WRAPPERS, make_family, model_type_of

from mlx_adapters.models.names import template
from mlx_adapters.models.torch_names import TABLE

__all__ = ["entry", "written"]

_TINY = {"dots1": tiny._FIELDS["dots1"]}  # compared with transformers, and none of the families
_FIELDS = FAMILIES | WRAPPERS | _TINY


def entry(name: str) -> tuple[str, dict[str, Any]]:
    """(class, rules) of one family: see `mlx_adapters.models.torch_names`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = model_type_of(name)
    config = AutoConfig.for_model(kind, **deepcopy(_FIELDS[name]))
    config.get_text_config().pad_token_id = None
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    with torch.device("meta"):
        model = (AutoModelForCausalLM if causal else AutoModelForImageTextToText).from_config(config)
    rules = [
        ([rule.scope_prefix] if rule.scope_prefix is not None else [])
        + ["|".join(re.sub(r"\*\.", r"[^.]*\\.", p) for p in rule.source_patterns), rule.target_patterns[0]]
        for rule in get_model_conversion_mapping(model, add_legacy=False)
        if "vision" not in str(rule.scope_prefix) and "audio" not in str(rule.scope_prefix)
    ]
    tops = {name.partition(".")[0] for name in model.state_dict()}
    return type(model).__name__, {
        "class": type(model).__name__,
        "prefix": model.base_model_prefix,
        "beside": sorted(tops - {model.base_model_prefix}),
        "rules": rules,
    } | _read(model) | _tensors(name)


def _read(model: Any) -> dict[str, Any]:
    """What the model reads of a checkpoint to compute text, and which of its modules it does not need for
    that."""
    ends = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    text = {id(tensor) for end in ends if end is not None for tensor in [*end.parameters(), *end.buffers()]}
    wrapper = model.config.get_text_config() is not model.config
    state = model.state_dict(keep_vars=True).items()
    read = [name for name, tensor in state if not wrapper or id(tensor) in text]
    towers = {".".join(name.split(".")[:2]) for name, _ in state} - {
        ".".join(name.split(".")[:2]) for name in read
    }
    return {
        "reads": sorted({template(name) for name in read}),
        **({"towers": sorted(towers)} if towers else {}),
    }


def _tensors(name: str) -> dict[str, Any]:
    """Where mlx-lm's tensors come from in a checkpoint of the family, as it is measured when it is loaded."""
    from mlx_adapters.errors import AdaptersError
    from mlx_adapters.models import load, names

    with tempfile.TemporaryDirectory() as place:
        try:
            make = tiny.make_tiny if name in _TINY else make_family
            loaded = load.load(make(name, Path(place)), lazy=True)
        except AdaptersError as error:
            print(f"{name}: {error}")
            return {}
    found = names.names_of(loaded.model)
    return {"tensors": names.as_record(found)} if found else {}


def written() -> dict[str, Any]:
    """The whole table."""
    found: dict[str, Any] = {}
    for name in _FIELDS:
        try:
            own, before = entry(name)[1], found.get(model_type_of(name), {}).get("reads", ())
            found[model_type_of(name)] = own | {"reads": sorted({*before, *own["reads"]})}
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:100]}")
    return {"transformers": metadata.version("transformers"), "names": dict(sorted(found.items()))}


def as_text(table: dict[str, Any]) -> str:
    """The table as JSON, a model_type a line."""
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in table["names"].items())
    return f'{{"transformers": {json.dumps(table["transformers"])},\n"names": {{\n{rows}\n}}}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    text = as_text(written())
    if parser.parse_args().write:
        TABLE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
