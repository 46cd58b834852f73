"""Whether an adapter names another base model than the one it is put on."""

import re
import sys
from pathlib import Path

from mlx_adapters.adapter.meta import AdapterMeta
from mlx_adapters.models.load import LanguageModel, describe
from mlx_adapters.models.origin import is_hub_id

__all__ = ["other_base", "say_other_base"]

# What copies of a model in another precision or format have behind its name.
_COPY = re.compile(
    r"(?:[-_.](?:\d+bit|int[48]|fp(?:8|16|32)|bf16|bnb|unsloth|gptq|awq|mlx|gguf|hf|dwq|mxfp4|nvfp4))+$"
)


def other_base(meta: AdapterMeta, loaded: LanguageModel) -> tuple[str, str] | None:
    """(the hub id that an adapter names as its base, that of `loaded`) where they are different models.

    None where one of them is not known by a hub id. Copies of a model by another owner, or in another
    precision or format, count as the same.
    """
    named, here = meta.hub_id, describe(loaded).get("_name_or_path")
    if named is None or not isinstance(here, str) or not is_hub_id(here) or _model(named) == _model(here):
        return None
    return named, here


def say_other_base(source: str | Path, meta: AdapterMeta, loaded: LanguageModel) -> None:
    """Say on stderr, in one line, that an adapter was trained on another base than `loaded`."""
    if found := other_base(meta, loaded):
        named, here = found
        print(
            f"mlx-adapters: {source} was trained on {named}, but this base is {here}: the shapes fit, "
            "the answers may not",
            file=sys.stderr,
        )


def _model(name: str) -> str:
    return _COPY.sub("", name.rpartition("/")[2].lower())
