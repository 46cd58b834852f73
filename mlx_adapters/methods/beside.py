"""What is trained whole beside an adapter: PEFT's `modules_to_save`, for any method on linear layers."""

from typing import ClassVar

import mlx.nn as nn

from mlx_adapters.errors import AdapterError, ConfigError, UnsupportedError
from mlx_adapters.fields import field
from mlx_adapters.methods.base import Method, Placed
from mlx_adapters.methods.modules import EMBEDDINGS, ModulesToSave, NormToSave, module_to_save
from mlx_adapters.methods.peft_fields import Fields
from mlx_adapters.methods.tied import HEAD, TiedToSave
from mlx_adapters.models import sites

__all__ = ["WHOLE", "WithModules", "listed"]

WHOLE = (ModulesToSave, NormToSave, TiedToSave)
"""The layers of modules that are trained whole."""


class WithModules(Method):
    """A method beside which modules of the base may be trained whole.

    It defines `select` and `wrap`, or `place_layers`, for its own layers.
    """

    HEAD_ALONE: ClassVar[bool] = False
    """Whether it can update an output head that is the embedding, and leave the embedding as it is."""

    modules_to_save: str = field("", "names of modules trained whole, as lm_head or embed_tokens")

    def place(self, model: nn.Module, model_type: str, paths: list[str] | None = None) -> Placed:
        """The method's own layers, and what is trained beside them."""
        beside = self.beside(model, model_type)
        own = self.place_layers(model, model_type, self.others(paths, beside, model))
        return own | beside

    def place_layers(self, model: nn.Module, model_type: str, paths: list[str] | None) -> Placed:
        """The method's own layers alone."""
        return super().place(model, model_type, paths)

    def others(self, paths: list[str] | None, beside: Placed, model: nn.Module) -> list[str] | None:
        """`paths` without what stands `beside`: those of the method's own layers. UnsupportedError for a tied
        head where the method has no layer for one."""
        if paths is None:
            return None
        left = [path for path in paths if path not in beside]
        if any(isinstance(module, TiedToSave) and "head_weight" in module for module in beside.values()):
            left = [path for path in left if path != HEAD]
        if HEAD in left and sites.tied(model) and not self.HEAD_ALONE:
            raise UnsupportedError(
                f"{self.NAME}: it adapts the output head {HEAD}, which here is the token embedding itself "
                "(tied): an adapter of the head alone is not read"
            )
        return left

    def beside(self, model: nn.Module, model_type: str) -> Placed:
        """The modules to be trained whole."""
        return _whole(model, self, model_type)

    def whole_modules(self) -> str | None:
        return self.modules_to_save

    def modules_field(self) -> Fields:
        """PEFT's field."""
        return {"modules_to_save": listed(self.modules_to_save) or None}

    @staticmethod
    def read_modules(fields: Fields) -> Fields:
        """Our option of PEFT's field."""
        names = fields.get("modules_to_save") or []
        if not isinstance(names, list):
            raise AdapterError(f"modules_to_save={names!r} is not a list of names")
        return {"modules_to_save": ",".join(names)}


def listed(names: str) -> list[str]:
    """The names in an option that joins them by commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def _whole(model: nn.Module, config: WithModules, model_type: str) -> Placed:
    modules, names = dict(model.named_modules()), listed(config.modules_to_save)
    # PEFT's rule: a name is the end of a path, and "norm" names every input_layernorm too
    found = {n: [p for p in modules if p and sites.to_hf(p, model_type).endswith(n)] for n in names}
    tied = sites.tied(model)
    head = tied and HEAD in names
    if missing := [name for name, paths in found.items() if not paths and not (head and name == HEAD)]:
        raise ConfigError(
            f"{config.NAME}: modules_to_save names {', '.join(missing)}, which this {model_type} model does "
            "not have"
        )
    if "embed_out" in found:
        raise UnsupportedError(
            "modules_to_save: transformers 4 calls GPT-NeoX's head embed_out and transformers 5 lm_head, so "
            "no adapter file fits both"
        )
    placed: Placed = {}
    for path in dict.fromkeys(path for paths in found.values() for path in paths):
        if tied and isinstance(modules[path], EMBEDDINGS) and path == sites.embedding(model):
            placed[path] = TiedToSave(modules[path], table=True, head=head)
        else:
            placed[path] = module_to_save(modules[path], path)
    if head and (path := sites.embedding(model)) not in placed:
        placed[path] = TiedToSave(modules[path], table=False, head=True)
    return placed
