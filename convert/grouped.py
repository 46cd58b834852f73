"""LoRA of LLM-Adapters on parts of a fused projection (`enable_lora`), read as plain LoRA of a larger rank.

The rows of the layer's output stand in as many groups as the list has entries, [true, false, true] say, and
each group that is on has an update of its own. A [g r, in] holds their g downward matrices one below the
other, B [g n, r, 1] the upward ones as a grouped convolution of width 1:

    y[group k] = W x + alpha / r * B_k A_k x      where the list says true, W x elsewhere

That is LoRA of rank g r with a B that is zero outside its blocks, and alpha g times as large.
"""

from typing import Any

import mlx.core as mx

from mlx_adapters.errors import AdapterError

__all__ = ["ungrouped"]

Arrays = dict[str, dict[str, mx.array]]


def ungrouped(fields: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
    """(fields, arrays) of a fork's LoRA without `enable_lora`, and of the same function.

    `arrays` are {path: {"lora_a": .., "lora_b": ..}}. Raises AdapterError for a list or for shapes that are
    not those of groups.
    """
    groups = fields.get("enable_lora")
    if groups in (None, []):
        return fields, arrays
    if not (isinstance(groups, list) and all(type(on) is bool for on in groups) and any(groups)):
        raise AdapterError(f"enable_lora={groups!r} is not a list of true and false, of which one is true")
    on = [number for number, wanted in enumerate(groups) if wanted]
    rank, alpha = fields["r"], fields["lora_alpha"]
    merged = {
        path: own if own.keys() == {"bias"} else own | _merged(path, own, rank, on, len(groups))
        for path, own in arrays.items()
    }
    plain = {name: value for name, value in fields.items() if name != "enable_lora"}
    return plain | {"r": rank * len(on), "lora_alpha": alpha * len(on)}, merged


def _merged(
    path: str, own: dict[str, mx.array], rank: int, on: list[int], groups: int
) -> dict[str, mx.array]:
    a, b = own.get("lora_a"), own.get("lora_b")
    if a is None or b is None:
        raise AdapterError(f"{path}: an adapter with enable_lora has lora_A and lora_B on each layer")
    b = b.reshape(b.shape[:2])
    if a.shape[0] != rank * len(on) or b.shape[1] != rank or b.shape[0] % len(on):
        raise AdapterError(
            f"{path}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are not {len(on)} groups of rank "
            f"{rank}"
        )
    rows = b.shape[0] // len(on)
    whole = mx.zeros((rows * groups, rank * len(on)), b.dtype)
    for number, group in enumerate(on):
        block = b[number * rows : (number + 1) * rows]
        whole[group * rows : (group + 1) * rows, number * rank : (number + 1) * rank] = block
    return {"lora_b": whole}
