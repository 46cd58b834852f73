"""Bytes and seconds as people write them."""

import re

__all__ = ["bytes_of", "duration", "size"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def size(count: float) -> str:
    """A number of bytes: `512 B`, `98 MB`, `1.23 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def bytes_of(text: str) -> int:
    """The number of bytes in a text like `16GB`, `1.5 tb` or `800000`; ValueError for any other."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if not found:
        raise ValueError(text)
    return int(float(found[1]) * _UNITS[found[2]])


def duration(seconds: float) -> str:
    """A number of seconds: `4.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
