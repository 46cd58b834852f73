"""Tensors of a checkpoint that neither the model nor its sanitize uses, which nothing else would name.

Most of these are nothing: buffers of old versions, towers for images, layers that predict further tokens.
What transformers computes text with is known of the families that were asked (`torch_names`); to drop such a
tensor is to compute something else.
"""

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from mlx_adapters.errors import CheckpointError, UnsupportedError
from mlx_adapters.models import torch_names
from mlx_adapters.models.marks import Sanitized, marks
from mlx_adapters.models.names import template

__all__ = ["left_out", "refuse_unread", "remark", "unread"]

Weights = dict[str, mx.array]


def refuse_unread(
    name: str, model_type: str, given: Weights, found: Sanitized, fresh: Callable[[Weights], Weights]
) -> tuple[str, ...]:
    """UnsupportedError for a kind of tensor that transformers' model computes with, and that is dropped here.

    Returns the first tensor of each kind that is dropped where it is not known what transformers reads. A
    kind is a template of names: of a single layer that is left out, transformers has none either.
    """
    known = torch_names.reads(model_type)
    kinds = unread(found, fresh, lambda n: known is None or _kind(n, model_type) in known)
    dropped = tuple(names[0] for names in kinds)
    heads = [one for one in dropped if one.rpartition(".")[0].endswith(("lm_head", "embed_out"))]
    for head in heads:
        _compare_head(name, head, given)
    dropped = tuple(one for one in dropped if one not in heads)
    if known is None or not dropped:
        return dropped
    raise UnsupportedError(
        f"{name}: {', '.join(dropped[:3])}{' ...' if len(dropped) > 3 else ''} are not used here, and are in "
        f"transformers' {model_type}: the results would be silently wrong; refused"
    )


def remark(names: tuple[str, ...]) -> str | None:
    """What a user must be told of tensors that are dropped; None where there are none."""
    if not names:
        return None
    more = f" and {len(names) - 3} other kinds" if len(names) > 3 else ""
    return f"not used, of the checkpoint: {', '.join(names[:3])}{more}"


def left_out(model: Any) -> list[str]:
    """The checkpoint's tensors that a loaded model does not use: those of towers for images, mostly."""
    found: Callable[[], Iterator[list[str]]] | None = getattr(model, "find_unread", None)
    return [name for names in found() for name in names] if found else []


def _kind(name: str, model_type: str) -> str:
    return template(torch_names.torch_name(name, model_type))


def unread(
    found: Sanitized, fresh: Callable[[Weights], Weights], wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[list[str]]:
    """The tensors of each kind, of those `wanted`, that a sanitize drops.

    A kind of which a tensor came out as it went in is used; of the others it is tried whether the sanitize,
    which `fresh` runs, makes the same without them.
    """
    used = {template(source) for source in found.plain.values()}
    left: dict[str, list[str]] = {}
    for name in found.given:
        if (kind := template(name)) not in used and wanted(name):
            left.setdefault(kind, []).append(name)
    for names in left.values():
        if len(found.plain) == len(found.made) or _spared(set(names), found, fresh):
            yield names


def _spared(names: set[str], found: Sanitized, fresh: Callable[[Weights], Weights]) -> bool:
    given = {name: shape for name, shape in found.given.items() if name not in names}
    try:
        made = fresh(marks(given))
    except Exception:  # whatever a model file raises where one of its tensors is missing
        return False
    return {name: array.shape for name, array in made.items()} == found.made


def _compare_head(name: str, head: str, given: Weights) -> None:
    """CheckpointError for an output head that is dropped because it is said to be the embedding, and is
    not."""
    same = [one for one, array in given.items() if one != head and array.shape == given[head].shape]
    embeddings = [one for one in same if "embed" in one or "wte" in one]
    if len(embeddings) == 1 and not mx.array_equal(given[embeddings[0]], given[head]).item():
        raise CheckpointError(
            f"{name}: config.json: field 'tie_word_embeddings' says that the output head is the embedding, "
            f"but {head} holds other values than {embeddings[0]}. Set it to false"
        )
