"""The decoder blocks in a module tree, by the paths of their modules."""

import re

__all__ = ["layer_index"]

_LAYER = re.compile(r"(?:^|\.)(?:\w*layers|h|blocks)\.(\d+)\.")


def layer_index(path: str) -> int | None:
    """The number of the decoder block that `path` lies in; None outside the blocks."""
    found = _LAYER.search(path)
    return int(found.group(1)) if found else None
