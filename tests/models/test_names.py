"""What a model file's sanitize does is found out on marks, kept as JSON, and the same both ways."""

from collections.abc import Callable

import mlx.core as mx
import pytest

from mlx_adapters.models.marks import measure, seen
from mlx_adapters.models.names import Names, Part, as_record, from_record
from mlx_adapters.models.torch_tree import TorchTree

Weights = dict[str, mx.array]
P = "model.layers.0.mlp."


def given() -> Weights:
    shapes = {
        f"{P}fused.weight": (8, 4),
        f"{P}one.weight": (6, 4),
        f"{P}norm.weight": (4,),
        f"{P}conv.weight": (4, 1, 3),
    }
    shapes |= {f"{P}experts.{n}.up.weight": (5, 4) for n in range(3)}
    return {name: mx.random.normal(shape) for name, shape in shapes.items()}


def renamed(w: Weights) -> Weights:
    return {f"language_model.{name}": array for name, array in w.items()}


def halves(w: Weights) -> Weights:
    gate, up = mx.split(w.pop(f"{P}fused.weight"), 2, axis=0)
    return w | {f"{P}gate.weight": gate, f"{P}up.weight": up}


def every_other(w: Weights) -> Weights:
    whole = w.pop(f"{P}fused.weight")
    return w | {f"{P}gate.weight": whole[::2], f"{P}up.weight": whole[1::2]}


def merged(w: Weights) -> Weights:
    return {f"{P}both.weight": mx.concatenate([w[f"{P}one.weight"], w[f"{P}fused.weight"]])}


def scaled(w: Weights) -> Weights:
    by = mx.array([2.0] * 3 + [0.5] * 3)
    return w | {
        f"{P}one.weight": w[f"{P}one.weight"] * by[:, None],
        f"{P}norm.weight": w[f"{P}norm.weight"] + 1.0,
    }


def in_place(w: Weights) -> Weights:
    for name, array in w.items():
        if name.endswith("one.weight"):
            array *= 3.0  # what mlx-lm's falcon_h1 does
    return w


def in_place_but_the_first(w: Weights) -> Weights:
    for name, array in w.items():
        if name.endswith("one.weight"):
            array *= mx.array([1.0] * 3 + [0.5] * 3)[:, None]
    return w


def turned(w: Weights) -> Weights:
    return w | {f"{P}conv.weight": w[f"{P}conv.weight"].moveaxis(2, 1)}


def stacked(w: Weights) -> Weights:
    return {f"{P}switch.up.weight": mx.stack([w[f"{P}experts.{n}.up.weight"] for n in range(3)])}


def part(name: str, **more: object) -> Part:
    return Part(source=f"model.layers.#.mlp.{name}.weight", **more)  # type: ignore[arg-type]


CASES: list[tuple[Callable[[Weights], Weights], dict[str, tuple[Part, ...]]]] = [
    (renamed, {"language_model.model.layers.#.mlp.one.weight": (part("one"),)}),
    (
        halves,
        {
            f"{P}gate.weight": (part("fused", rows=(0, 4, 1)),),
            f"{P}up.weight": (part("fused", rows=(4, 8, 1)),),
        },
    ),
    (
        every_other,
        {
            f"{P}gate.weight": (part("fused", rows=(0, 8, 2)),),
            f"{P}up.weight": (part("fused", rows=(1, 9, 2)),),
        },
    ),
    (merged, {f"{P}both.weight": (part("one", rows=(0, 6, 1)), part("fused", rows=(0, 8, 1)))}),
    (
        scaled,
        {
            f"{P}one.weight": (
                part("one", rows=(0, 3, 1), scale=2.0),
                part("one", rows=(3, 6, 1), scale=0.5),
            ),
            f"{P}norm.weight": (part("norm", shift=1.0),),
        },
    ),
    (in_place, {f"{P}one.weight": (part("one", scale=3.0),), f"{P}fused.weight": (part("fused"),)}),
    (
        in_place_but_the_first,
        {f"{P}one.weight": (part("one", rows=(0, 3, 1)), part("one", rows=(3, 6, 1), scale=0.5))},
    ),
    (turned, {f"{P}conv.weight": (part("conv", axes=(0, 2, 1)),)}),
    (stacked, {f"{P}switch.up.weight": (part("experts.*.up", stacked=3),)}),
    (lambda w: {f"{P}x.weight": w[f"{P}one.weight"] @ mx.ones((4, 4))}, {f"{P}x.weight": ()}),
    (lambda w: {f"{P}x.weight": w[f"{P}one.weight"][mx.array([3, 1, 5, 0, 4, 2])]}, {f"{P}x.weight": None}),
]


@pytest.mark.parametrize(("sanitize", "expected"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_sanitize_does_is_found(
    sanitize: Callable[[Weights], Weights], expected: dict[str, tuple[Part, ...] | None]
) -> None:
    names = found(sanitize)
    for name, parts in expected.items():
        own = names.tensors[name.replace(".0.", ".#.")]
        # a permutation may be told row by row; it is never taken for something simpler
        assert own == parts if parts is not None else len(own) != 1, name


def found(sanitize: Callable[[Weights], Weights]) -> Names:
    source = given()
    made = sanitize(dict(source))
    names = measure(seen(source, made), lambda weights: sanitize(dict(weights)))
    assert names is not None
    return names


@pytest.mark.parametrize("sanitize", [case[0] for case in CASES[:8]], ids=lambda value: value.__name__)
def test_a_checkpoint_is_made_again(sanitize: Callable[[Weights], Weights]) -> None:
    from mlx_adapters.convert.to_transformers import checkpoint_tensors

    source = given()
    before = {name: mx.array(array) for name, array in source.items()}
    made = sanitize(dict(source))
    again = checkpoint_tensors(found(sanitize), dict(made))
    assert again
    for name, array in again.items():
        assert mx.allclose(array, before[name], atol=1e-6), name


def test_names_are_kept_as_json() -> None:
    import json

    for sanitize, _ in CASES[:8]:
        names = found(sanitize)
        assert from_record(json.loads(json.dumps(as_record(names)))) == names


def test_modules_of_pytorch_and_back() -> None:
    tree = TorchTree(found(halves), "no_such_type")
    (gate,) = tree.spots("model.layers.3.mlp.gate")
    assert gate.module == "model.layers.3.mlp.fused"
    assert gate.split
    assert [spot.path for spot in tree.sources(gate.module)] == [
        "model.layers.3.mlp.gate",
        "model.layers.3.mlp.up",
    ]
    assert tree.spots("model.layers.3.mlp.other") == ()
