"""Let modules of a model compute otherwise than their file says, without touching that file."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import CodeType, FunctionType
from typing import Any

__all__ = ["rebind", "replace_call"]


def rebind(model: Any, replaced: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
    """Let the modules of `model` call `replaced[f]` wherever their methods name the function f.

    Each such module becomes one of a subclass whose methods are the same code with other names in reach: the
    files that define the classes stay as they are, and so do arrays, names and `isinstance`. Twice is once.
    """
    pairs = tuple(replaced.items())
    for module in model.modules():
        kind: Any = type(module)
        module.__class__ = _rebound(kind, pairs)


@cache
def _rebound(kind: Any, pairs: tuple[tuple[Any, Any], ...]) -> Any:
    """`kind`, or a subclass of it whose methods call the second function of each pair."""
    own: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        for name, method in vars(base).items():
            if isinstance(method, FunctionType):
                own[name] = method
    changed = {name: _same(method, pairs) for name, method in own.items()}
    changed = {name: method for name, method in changed.items() if method is not own[name]}
    if not changed:
        return kind
    about = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), changed | about)


def _same(method: FunctionType, pairs: tuple[tuple[Any, Any], ...]) -> FunctionType:
    """`method`, or its code with the second function of each pair under the name of the first."""
    reach = method.__globals__
    names = {
        name: new for name in _names(method.__code__) for old, new in pairs if reach.get(name, pairs) is old
    }
    if not names:
        return method
    same = FunctionType(
        method.__code__, reach | names, method.__name__, method.__defaults__, method.__closure__
    )
    same.__kwdefaults__ = method.__kwdefaults__
    return same


def _names(code: CodeType) -> Iterator[str]:
    """The names that a function looks up, those of the functions inside it among them."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def replace_call(base: type, call: Callable[..., Any]) -> type:
    """A subclass of `base` under its name that computes `call(self, ...)`: set as a module's `__class__`, it
    changes that module alone."""
    return type(base.__name__, (base,), {"__call__": call})
