"""Updates of single expert matrices as updates of PEFT's two stacks.

mlx-lm adapts each stacked matrix of a mixture by itself. PEFT knows gate and up as one matrix only, so their
factors become the blocks of one pair whose rank is the sum of both, which computes the same:

    [gate]   [B_gate   0  ] [A_gate]
    [ up ] = [  0    B_up ] [ A_up ]

Trained on, the two blocks of zeros train too. A matrix without an update gets one of zeros.
"""

from collections.abc import Iterable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.methods.experts import is_block, matrices, parts
from mlx_adapters.methods.lora import LoRA
from mlx_adapters.methods.patterns import as_text
from mlx_adapters.models import sites
from mlx_adapters.models.architectures.table import architecture

__all__ = ["joined"]

Arrays = dict[str, dict[str, mx.array]]


def joined(arrays: Arrays, method: LoRA, model: nn.Module, model_type: str) -> tuple[Arrays, LoRA]:
    """(the arrays by path, the method) of a LoRA whose mixtures are adapted as PEFT has them.

    `arrays` has those of `ExpertLayer` at single matrices, A [experts, rank, in] and B [experts, out, rank],
    all of the rank and the scale of `method`; the arrays of other layers pass.
    """
    row = architecture(model_type)
    in_turns = row.experts is not None and row.experts.interleaved
    found, ranks = dict(arrays), dict[str, int]()
    for path, block in model.named_modules():
        if not is_block(block):
            continue
        into, out = matrices(block)
        single = {name: own for name in (*into, out) if (own := found.pop(f"{path}.{name}", None))}
        if not single:
            continue
        first = _pair([single.get(name) for name in into], block[into[0]], in_turns)
        last = _pair([single.get(out)], block[out], False)
        found[path] = {"gate_up_a": first[0], "gate_up_b": first[1], "lora_a": last[0], "lora_b": last[1]}
        name = sites.to_hf(path, model_type)
        for part, (a, _) in zip(parts(block), (first, last), strict=True):
            ranks[f"{name}.{part}"] = a.shape[0] // block[out].num_experts
    others = {name: rank for name, rank in ranks.items() if rank != method.rank}
    if len(set(others.values())) == 1 and len(others) == sum(n.endswith(_end(others)) for n in ranks):
        others = {_end(others): next(iter(others.values()))}  # the same in all blocks
    names = ["experts" if "gate_up_a" in own else path.rpartition(".")[2] for path, own in found.items()]
    return found, replace(
        method,
        rank_pattern=as_text({name: float(rank) for name, rank in others.items()}),
        alpha_pattern=as_text({name: method.alpha * rank / method.rank for name, rank in others.items()}),
        targets=",".join(sorted(set(names))),
    )


def _end(names: Iterable[str]) -> str:
    """The last two parts of the first name: `experts.gate_up_proj`."""
    return ".".join(next(iter(names)).split(".")[-2:])


def _pair(
    updates: list[dict[str, mx.array] | None], base: nn.Module, in_turns: bool
) -> tuple[mx.array, mx.array]:
    """(A, B) of one stack in PEFT's layout from the updates of the matrices it holds, in their order."""
    experts, width, into = base.num_experts, base.output_dims, base.input_dims
    own = [
        update or {"lora_a": mx.zeros((experts, 1, into)), "lora_b": mx.zeros((experts, width, 1))}
        for update in updates
    ]
    a = mx.concatenate([update["lora_a"] for update in own], axis=1)
    rows, before = [], 0
    for update in own:
        rank = update["lora_b"].shape[-1]
        rows.append(mx.pad(update["lora_b"], [(0, 0), (0, 0), (before, a.shape[1] - before - rank)]))
        before += rank
    b = mx.stack(rows, axis=2).flatten(1, 2) if in_turns else mx.concatenate(rows, axis=1)
    return a.flatten(0, 1), b.transpose(1, 2, 0).flatten(1, 2)
