"""Bottleneck adapters beside linear layers."""

import mlx.nn as nn

from mlx_adapters.methods.base import Site, resolve_targets
from mlx_adapters.methods.bottleneck import Layer, LinearBottleneck
from mlx_adapters.methods.peft_fields import Fields


class Parallel(LinearBottleneck):
    """Parallel: bottleneck adapters beside linear layers. He et al. 2021, https://arxiv.org/abs/2110.04366;
    per linear layer as in Hu et al. 2023 (LLM-Adapters), https://arxiv.org/abs/2304.01933

        y = W x + f(x),    f(x) = scaling * up(act(down(drop(x)))), without biases

    With `scaling=learned` one scalar per layer is trained: the scaled parallel adapter. The folder is
    LLM-Adapters' (peft_type BOTTLENECK); no PEFT release has the method.
    """

    NAME = "parallel"
    TITLE = "Parallel: bottleneck adapters beside linear layers"
    AUTHORS = "He et al. 2021"
    PAPER = "https://arxiv.org/abs/2110.04366"

    def select(self, model: nn.Module, model_type: str) -> list[str]:
        return resolve_targets(
            model, model_type, targets=self.targets, layers=self.layers, default="parallel"
        )

    def wrap(self, base: nn.Module, site: Site) -> Layer:
        return self.layer(base, "parallel")

    @classmethod
    def claims(cls, fields: Fields) -> bool:
        """Whether a BOTTLENECK configuration is a parallel adapter."""
        return bool(fields.get("use_parallel_adapter"))

    def to_peft(self) -> Fields:
        return {**super().to_peft(), "use_parallel_adapter": True, "use_adapterp": False}
