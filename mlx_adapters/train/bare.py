"""Take off a model what training put on it: the adapter, and the classes of modules that it exchanged."""

from collections.abc import Callable

import mlx.nn as nn

__all__ = ["remember"]


def remember(model: nn.Module) -> Callable[[], None]:
    """A function that gives `model` the modules back that it has now, and each of them its class.

    Arrays are not kept: an adapter leaves those of the base as they are. What was frozen stays frozen.
    """
    modules = [(module, type(module), module.children()) for module in model.modules()]

    def restore() -> None:
        for module, kind, children in modules:
            for name in module.children().keys() - children.keys():  # a prefix is a new attribute
                delattr(module, name)
            module.update_modules(children)
            module.__class__ = kind

    return restore
