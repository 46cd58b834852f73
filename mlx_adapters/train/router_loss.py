"""The load-balancing loss of a mixture of experts (Fedus et al. 2021, https://arxiv.org/abs/2101.03961).

    loss = E sum_e f_e P_e

f_e is the share of tokens that go to expert e, counted once for each of their experts, and P_e the mean of
the softmax of the router's logits: the gradient reaches P alone. As in transformers all layers count as one,
and padding does not count.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.adapter.call import needs_cache
from mlx_adapters.data.batches import Batch
from mlx_adapters.errors import UnsupportedError
from mlx_adapters.models.routers import BLOCKS, Choice, recorded, routers
from mlx_adapters.train.loss import loss_sum

__all__ = ["balance", "refuse_without_routers", "balanced_sum"]


def balance(choices: list[Choice], read: mx.array) -> mx.array:
    """The loss of what the routers chose, a float32 scalar: 0 where no token counts, top_k at balance.

    Args:
        choices: one for each layer with experts; logits [rows, time, experts], or the first two as one.
        read: float32 [rows, time], 1 for the tokens that count and 0 for padding. Further tokens in front
            (virtual ones) count.
    """
    experts = choices[0].logits.shape[-1]
    chosen, probable, tokens = mx.zeros((experts,)), mx.zeros((experts,)), mx.array(0.0)
    for choice in choices:
        p = mx.softmax(choice.logits.astype(mx.float32), axis=-1).reshape(read.shape[0], -1, experts)
        front = p.shape[1] - read.shape[1]
        counts = mx.pad(read, [(0, 0), (front, 0)], constant_values=1)[..., None]
        taken = mx.stop_gradient(mx.argpartition(-p, kth=choice.top_k - 1, axis=-1)[..., : choice.top_k])
        taken = (taken[..., None] == mx.arange(experts)).any(axis=-2)
        chosen = chosen + (taken * counts).sum(axis=(0, 1))
        probable = probable + (p * counts).sum(axis=(0, 1))
        tokens = tokens + counts.sum()
    return experts * (chosen * probable).sum() / mx.maximum(tokens, 1.0) ** 2


def refuse_without_routers(model: nn.Module) -> None:
    """UnsupportedError where the model has no experts, or the logits of a router are not found."""
    name = type(model).__module__.rpartition(".")[2]
    blocks = [path for path, module in model.named_modules() if type(module).__name__ in BLOCKS]
    if not blocks:
        raise UnsupportedError(f"router_aux_loss: this {name} model has no stacked experts. Leave it off")
    if len(routers(model)) < len(blocks):
        raise UnsupportedError(
            f"router_aux_loss: the router's logits are not found in this {name} model, whose router is no "
            "linear layer beside the experts. Leave it off"
        )


def balanced_sum(
    model: nn.Module, batch: Batch, *, head: Any, cache: list[Any] | None, share: float
) -> mx.array:
    """`loss_sum`, and `share` of the routers' balance as many times as the batch has labels: their mean is
    transformers' loss."""
    assert batch.read is not None
    needs_cache(model, batch.ids.shape[0])  # its trial is not to be recorded
    with recorded(model) as choices:
        loss = loss_sum(model, batch, head=head, cache=cache)
    return loss + share * batch.weights.sum() * balance(choices, batch.read)
