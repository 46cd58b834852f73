"""Values that differ from layer to layer, written as text: NAME=NUMBER,NAME=NUMBER."""

import math
import re

from mlx_adapters.errors import ConfigError

__all__ = ["as_text", "fits", "matching", "parse"]


def parse(text: str, name: str) -> dict[str, float]:
    """{pattern: number} of the field `name`; ConfigError where the text is not written so."""
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = part.rpartition("=")
        try:
            found[key] = float(value)
            re.compile(key)
        except (ValueError, re.error):
            key = ""
        if not key or not 0 < found[key] < math.inf:
            raise ConfigError(f"lora: {name}={text!r}: write it as NAME=NUMBER,NAME=NUMBER")
    return found


def as_text(pattern: dict[str, float]) -> str:
    """The inverse of `parse`, digit by digit."""
    return ",".join(f"{key}={int(v) if v == int(v) else v!r}" for key, v in pattern.items())


def fits(key: str, path: str) -> bool:
    """PEFT's rule: a key is a pattern for the end of the path."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def matching(text: str, name: str, path: str) -> float | None:
    """The number of the first key that fits the path."""
    return next((value for key, value in parse(text, name).items() if fits(key, path)), None)
