"""Tensors of a checkpoint that nothing uses: harmless ones pass, others are named."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import mlx.core as mx
import pytest

from mlx_adapters.errors import CheckpointError, UnsupportedError
from mlx_adapters.models.marks import seen
from mlx_adapters.models.unread import refuse_unread, remark

Weights = dict[str, mx.array]
P = "model.layers.0."
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def given() -> Weights:
    shapes = {f"{P}self_attn.{name}_proj.weight": (4, 4) for name in "qkv"}
    shapes |= {EMBEDDING: (9, 4), f"{P}mlp.up_proj.weight": (6, 4), f"{P}mlp.up_proj.bias": (6,)}
    return {name: mx.random.normal(shape) for name, shape in shapes.items()}


def told(
    weights: Weights, sanitize: Callable[[Weights], Weights], model_type: str = "llama"
) -> tuple[str, ...]:
    def fresh(w: Weights) -> Weights:
        return sanitize(dict(w))

    return refuse_unread("folder", model_type, weights, seen(weights, fresh(weights)), fresh)


def without(*ends: str) -> Callable[[Weights], Weights]:
    return lambda w: {name: array for name, array in w.items() if not name.endswith(ends)}


def joined(w: Weights) -> Weights:
    parts = [w.pop(f"{P}self_attn.{name}_proj.weight") for name in "qkv"]
    return w | {f"{P}self_attn.qkv.weight": mx.concatenate(parts)}


@pytest.mark.parametrize("sanitize", [lambda w: w, joined, without("inv_freq", "visual.weight")])
def test_what_is_used_or_does_nothing_passes(sanitize: Callable[[Weights], Weights]) -> None:
    more = {f"{P}self_attn.rotary_emb.inv_freq": mx.ones(4), "visual.weight": mx.ones(4)}
    assert told(given() | more, sanitize) == ()


@pytest.mark.parametrize("also", [lambda w: w, joined], ids=["alone", "beside one that is joined"])
def test_what_transformers_computes_with_is_named(also: Callable[[Weights], Weights]) -> None:
    with pytest.raises(UnsupportedError, match=r"folder: model\.layers\.0\.mlp\.up_proj\.bias are not used"):
        told(given(), lambda w: also(without("up_proj.bias")(w)))


def test_of_a_family_that_was_not_asked_it_is_told() -> None:
    names = told(given(), without("up_proj.bias"), "unheard_of")
    assert names == (f"{P}mlp.up_proj.bias",)
    assert remark(names) == f"not used, of the checkpoint: {P}mlp.up_proj.bias"


def test_a_head_that_is_not_the_embedding_is_named() -> None:
    weights = given()
    assert told(weights | {HEAD: mx.array(weights[EMBEDDING])}, without(HEAD)) == ()
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings.*other values than model\.embed_tokens"):
        told(weights | {HEAD: mx.ones((9, 4))}, without(HEAD))


def test_the_bias_that_ernies_file_drops_would_be_named(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from families import make_family

    from mlx_adapters.models import config as model_config
    from mlx_adapters.models import load as models

    folder = make_family("ernie4_5_moe", tmp_path)
    assert models.load(folder, lazy=True).model.unread == ()
    with (
        mock.patch.object(
            model_config, "corrected", lambda model, args, *_: (model, args)
        ),  # mlx-lm's file as it is
        pytest.raises(UnsupportedError, match=r"moe_statics\.e_score_correction_bias are not used"),
    ):
        models.load(folder, lazy=True)
