"""What a model file's `sanitize` does to names and values, found out by running it.

A tensor that comes out as the object it went in was renamed at most; every other one is found by marks.
Sanitize is run on tensors of zeros, of ones, of the number of their tensor and of the numbers of their rows,
columns, ..., which tell for each element that comes out where it came from, what it was multiplied by and
what was added.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_adapters.models.names import Names, Part, fill, numbers_of, template

__all__ = ["Sanitized", "marks", "measure", "seen"]

Weights = dict[str, mx.array]
Shapes = dict[str, tuple[int, ...]]
_PIECES = 16  # a tensor in more pieces was permuted, which is not described here


@dataclass(frozen=True)
class Sanitized:
    """What can be seen of a model's sanitize without computing: the shapes of the tensors that it was `given`
    and of those that it `made`, and which of these, `plain`, are the very object of a name given."""

    given: Shapes
    made: Shapes
    plain: dict[str, str]


def seen(given: Weights, made: Weights) -> Sanitized:
    """What is seen of a sanitize that made `made` of `given`."""
    by_id = {id(array): name for name, array in given.items()}
    plain = {name: by_id[id(array)] for name, array in made.items() if id(array) in by_id}
    return Sanitized(_shapes(given), _shapes(made), plain)


def _shapes(weights: Weights) -> Shapes:
    return {name: array.shape for name, array in weights.items()}


def measure(
    found: Sanitized, sanitize: Callable[[Weights], Weights], *, packed: bool = False
) -> Names | None:
    """Where the tensors that a model's sanitize made come from.

    `sanitize` runs that of a fresh model, since some change the model they are called on. With `packed`
    (a checkpoint in MLX's quantization) nothing is marked. None where sanitize does not run on marks.
    """
    given, made, plain = found.given, found.made, found.plain
    if packed and len(plain) < len(made):
        return None
    try:
        ones, stacks = ({}, {}) if packed else _with_ones(given, sanitize)
        # an array that was multiplied in place is the same object, with other values
        odd = {template(n) for n in _samples(list(plain), made) if n not in ones or _changed(ones[n])}
        plain = plain if packed else {n: source for n, source in plain.items() if template(n) not in odd}
        parts: dict[str, tuple[Part, ...]] = {n: (Part(source=source),) for n, source in plain.items()}
        parts |= {n: own for n, names in stacks.items() if n in made and (own := _stacked(names))}
        changed = _samples([name for name in made if name not in parts], made)
        parts |= _marked(given, changed, sanitize) if changed else {}
    except Exception:  # whatever a model file raises for arrays that are not a checkpoint's
        return None
    return _compact(parts, made, given)


def _with_ones(given: Shapes, sanitize: Callable[[Weights], Weights]) -> tuple[Weights, dict[str, list[str]]]:
    """What a sanitize makes of ones, and which of it are stacks of which tensors.

    Stacks of experts are the largest arrays by far: they are found by what `mx.stack` is called with, and
    never computed. The function in its place does the same for any other arrays.
    """
    ones = marks(given)
    known = {id(array): name for name, array in ones.items()}
    stacks: dict[int, tuple[mx.array, list[str]]] = {}
    plain = mx.stack

    def stack(arrays: Iterable[mx.array], axis: int = 0, **more: Any) -> mx.array:
        arrays = list(arrays)
        names = [known[id(array)] for array in arrays if id(array) in known]
        if not names or len(names) < len(arrays) or axis or any(map(_changed, (arrays[0], arrays[-1]))):
            return plain(arrays, axis, **more)
        made = mx.broadcast_to(mx.array(1.0), (len(arrays), *arrays[0].shape))
        stacks[id(made)] = made, names
        return made

    try:
        mx.stack = stack  # type: ignore[assignment]
        made = sanitize(ones)
    finally:
        mx.stack = plain
    found = {name: stacks[id(array)][1] for name, array in made.items() if id(array) in stacks}
    return made, {name: names for name, names in found.items() if not _changed(made[name])}


def _first(array: mx.array) -> float:
    value: Any = array[(0,) * array.ndim].item()
    return float(value)


def _changed(ones: mx.array) -> bool:
    """Whether a tensor that was ones holds another value along one of its axes."""
    lines = (ones[_across(ones.ndim, axis)] for axis in range(max(ones.ndim, 1)))
    return any(mx.any(line != 1).item() for line in lines)


def _across(axes: int, axis: int) -> tuple[Any, ...]:
    """The index of the first line along one of the axes of a tensor."""
    return tuple(slice(None) if n == axis else 0 for n in range(axes))


def marks(given: Shapes, mark: Callable[[int, tuple[int, ...]], mx.array] | None = None) -> Weights:
    """Tensors of these shapes to run a sanitize on: of ones, or of `mark`(number of the tensor, shape)."""
    mark = mark or (lambda number, shape: mx.array(1.0))
    return {name: mx.broadcast_to(mark(i, shape), shape) for i, (name, shape) in enumerate(given.items())}


def _samples(names: list[str], made: Shapes) -> list[str]:
    """The first and the last name of each template; of stacks of experts, which take long, the first."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(template(name), []).append(name)
    ends = ((n[0],) if math.prod(made[n[0]]) > 1 << 24 else (n[0], n[-1]) for n in kinds.values())
    return [name for found in ends for name in dict.fromkeys(found)]


def _marked(
    shapes: Shapes, names: list[str], sanitize: Callable[[Weights], Weights]
) -> dict[str, tuple[Part, ...]]:
    order = list(shapes)
    depth = max(len(shape) for shape in shapes.values())

    def run(mark: Callable[[int, tuple[int, ...]], mx.array]) -> Weights:
        return sanitize(marks(shapes, mark))

    def along(axis: int) -> Callable[[int, tuple[int, ...]], mx.array]:
        def mark(number: int, shape: tuple[int, ...]) -> mx.array:
            if axis >= len(shape):
                return mx.array(0.0)
            view = [size if n == axis else 1 for n, size in enumerate(shape)]
            return mx.arange(shape[axis], dtype=mx.float32).reshape(view)

        return mark

    passes = [run(lambda i, s: mx.array(0.0)), run(lambda i, s: mx.array(1.0))]
    passes.append(run(lambda i, s: mx.array(float(i))))
    passes += [run(along(axis)) for axis in range(depth)]
    passes.append(run(lambda i, shape: _noise(shape)))
    found: dict[str, tuple[Part, ...]] = {}
    for name in names:
        if any(name not in one for one in passes):
            found[name] = ()
            continue
        found[name] = _origin([one.pop(name) for one in passes], order, shapes)
    return found


def _noise(shape: tuple[int, ...]) -> mx.array:
    """A sum of one random number for each index: mixtures of elements are none of them."""
    made = mx.array(0.0)
    for axis, size in enumerate(shape):
        view = [1] * len(shape)
        view[axis] = size
        made = made + mx.array(_random(axis, size)).reshape(view)
    return made


def _random(axis: int, size: int) -> np.ndarray:
    return np.random.default_rng(axis).random(size, dtype=np.float32)


@dataclass(frozen=True)
class _Line:
    """Elements of a tensor: what each was multiplied by, what was added, its tensor and its place there."""

    scale: np.ndarray
    shift: np.ndarray
    tensor: np.ndarray
    places: np.ndarray  # [axes of the source, elements]


def _line(passes: list[mx.array], where: tuple[Any, ...], axes: int) -> _Line | None:
    """None where the elements are not each one of the source's, which has `axes`."""
    zero, one, number, *places, noise = (
        np.array(array[where].astype(mx.float32)).ravel() for array in passes
    )
    scale = one - zero
    safe = np.where(scale == 0, 1, scale)
    at = np.rint(np.stack([(place - zero) / safe for place in places])).astype(int)
    if (at < 0).any():
        return None
    expected = sum(_random(axis, int(own.max()) + 1)[own] for axis, own in enumerate(at[:axes]))
    if not np.allclose((noise - zero) / safe, expected, atol=1e-3):
        return None
    return _Line(scale, zero, np.rint((number - zero) / safe).astype(int), at)


def _origin(passes: list[mx.array], order: list[str], shapes: dict[str, tuple[int, ...]]) -> tuple[Part, ...]:
    """The parts of one tensor, () where they are not of the form of `Part`."""
    shape = passes[0].shape
    if not shape:
        return ()

    zero, one, first = (_first(array) for array in passes[:3])
    number = round((first - zero) / (one - zero)) if one != zero else -1
    if not 0 <= number < len(order):
        return ()
    depth = len(shapes[order[number]])
    found = [_line(passes, _across(len(shape), axis), depth) for axis in range(len(shape))]
    lines = [line for line in found if line is not None]
    if len(lines) < len(found) or any((line.scale == 0).any() for line in lines):
        return ()  # it holds values that are not the checkpoint's
    names = [order[number] for number in lines[0].tensor]
    source = shapes[names[0]]
    if stack := _stack(lines, names, source, shape):
        return stack
    if len(source) != len(shape):
        return ()
    axes = _axes(lines, source, shape)
    if axes is None or any(len(shapes[name]) != len(source) for name in names):
        return ()
    return _pieces(lines, names, axes, shapes)


def _stack(
    lines: list[_Line], names: list[str], source: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[Part, ...]:
    """One source for each index of the first axis."""
    if len(source) != len(shape) - 1 or source != tuple(shape[1:]) or len(names) < 2:
        return ()
    whole = all((line.places[n] == np.arange(len(line.tensor))).all() for n, line in enumerate(lines[1:]))
    if not whole or (lines[0].scale != 1).any() or (lines[0].shift != 0).any():
        return ()
    return _stacked(names)


def _stacked(names: list[str]) -> tuple[Part, ...]:
    """The part that these tensors are, stacked; empty where no number in the names counts them."""
    numbers = [numbers_of(name) for name in names]
    running = [
        k for k in range(len(numbers[0])) if [row[k] for row in numbers] == list(map(str, range(len(names))))
    ]
    if len(names) < 2 or not running:
        return ()
    pieces = template(names[0]).split("#")
    filled = numbers[0][: running[-1]] + ["*"] + numbers[0][running[-1] + 1 :]
    text = "".join(piece + number for piece, number in zip(pieces, [*filled, ""], strict=True))
    return (Part(source=text, stacked=len(names)),)


def _axes(lines: list[_Line], source: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """For each axis of the tensor that of the source; None where an element's place is another sum."""
    axes: list[int | None] = []
    for line in lines:
        moving = [n for n in range(len(source)) if len(set(line.places[n])) > 1]
        if len(moving) > 1:
            return None
        axes.append(moving[0] if moving else None)
    left = [n for n in range(len(source)) if n not in axes]
    if axes[0] is None and 0 in left:
        axes[0] = left.pop(left.index(0))
    filled = []
    for size, axis in zip(shape, axes, strict=True):
        fits = [n for n in left if source[n] == size]
        if axis is None and not fits:
            return None
        filled.append(left.pop(left.index(fits[0])) if axis is None else axis)
    return tuple(filled) if sorted(filled) == list(range(len(source))) else None


def _pieces(
    lines: list[_Line], names: list[str], axes: tuple[int, ...], shapes: dict[str, tuple[int, ...]]
) -> tuple[Part, ...]:
    source = shapes[names[0]]
    cut = [
        n
        for n, one in enumerate(lines)
        if not np.array_equal(one.places[axes[n]], np.arange(source[axes[n]]))
        or any((values != values[0]).any() for values in (one.scale, one.shift, one.tensor))
    ]
    if len(cut) > 1 or (cut and cut[0] > 0 and len(set(names)) > 1):
        return ()
    along = cut[0] if cut else 0
    line = lines[along]
    rows = line.places[axes[along]]
    names = names if along == 0 else names[:1] * len(rows)
    turned = None if axes == tuple(range(len(axes))) else axes
    parts: list[Part] = []
    start = 0
    for end in range(1, len(rows) + 1):
        step = int(rows[start + 1] - rows[start]) if end - start > 1 else None
        same = end < len(rows) and (
            names[end] == names[start]
            and line.scale[end] == line.scale[start]
            and line.shift[end] == line.shift[start]
            and (rows[end] - rows[end - 1] == step if step else rows[end] > rows[end - 1])
        )
        if same:
            continue
        first, by = int(rows[start]), step or 1
        whole = end - start == len(rows) and (first, by, end - start) == (0, 1, source[axes[along]])
        parts.append(
            Part(
                source=names[start],
                rows=None if whole else (first, first + by * (end - start), by),
                scale=float(line.scale[start]),
                shift=float(line.shift[start]),
                axes=turned,
                along=along,
            )
        )
        start = end
        if len(parts) > _PIECES:
            return ()
    return tuple(parts)


def _compact(found: dict[str, tuple[Part, ...]], made: Shapes, given: Shapes) -> Names:
    """`found` by template. A template whose tensors come from differently named ones stays without parts."""
    kinds: dict[str, list[str]] = {}
    for name in made:
        kinds.setdefault(template(name), []).append(name)
    tensors: dict[str, tuple[Part, ...]] = {}
    for kind, members in kinds.items():
        seen = {tuple(_general(part, name) for part in found[name]) for name in members if name in found}
        parts = seen.pop() if len(seen) == 1 else ()
        names = [fill(part.source, numbers_of(name)) for part in parts for name in members]
        if any("*" not in name and name not in given for name in names):
            parts = ()
        tensors[kind] = parts
    return Names(tensors)


def _general(part: Part, name: str) -> Part:
    """`part` of the tensor `name`, with a template as source."""
    general = template(part.source)
    if fill(general, numbers_of(name)) != part.source:
        return part  # the checkpoint counts otherwise
    return replace(part, source=general)
