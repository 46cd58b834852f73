"""What PEFT opens of an adapter, by what transformers has at the names of its layers.

PEFT raises at a layer whose module it does not know, and leaves out tensors whose layer it does not find
without a word. The rows of the architectures say where (`PeftGaps`): nothing is needed where the names are
the same and the module is a linear layer.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

from mlx_adapters.methods.experts import EXPERT_NAMES
from mlx_adapters.models.architectures.row import Architecture
from mlx_adapters.models.architectures.table import architecture

__all__ = ["closed"]

# Models of text and images: transformers has model.language_model.layers there.
_INSIDE = "language_model."
# What plain LoRA adapts as a parameter where a module of transformers' own chooses the experts.
_ROUTER = re.compile(r"(?:^|\.)(?:gate|router|router\.layer)$")
_ON_LAYERS = ("lora", "dora", "ia3", "vera", "ln_tuning")


def closed(
    method: str, model_type: str, paths: Iterable[str], *, measured: bool = False, dense: bool = False
) -> list[str]:
    """The last names of those paths of PyTorch at which PEFT does not open `method`.

    `measured`: names and values are PyTorch's, as they were measured on the base (`models.names`). `dense`:
    the base has no experts, as some of its type have.
    """
    if method not in _ON_LAYERS:
        return []
    row = architecture(model_type)
    row = replace(row, peft=replace(row.peft, stacked=row.peft.stacked and not dense))
    return sorted({path.rpartition(".")[2] for path in paths if _is_closed(method, row, path, measured)})


def _is_closed(method: str, row: Architecture, path: str, measured: bool) -> bool:
    name = path.rpartition(".")[2]
    if path.startswith(_INSIDE) and not measured:
        return True
    renamed = row.peft.absent == ".*" and measured  # it has them all, under the names that were found
    if not renamed and re.search(rf"(?:^|\.)(?:{row.peft.absent})$", path):
        return True
    if row.shifted_norms and "norm" in name and not measured:
        return True
    if method in ("lora", "dora") and row.peft.state_space and name == "out_proj":
        return True
    if method in ("lora", "ln_tuning"):
        return False
    if row.peft.routed and _ROUTER.search(path):
        return True
    return method == "dora" and row.peft.stacked and name in EXPERT_NAMES
