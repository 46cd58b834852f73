"""A new adapter method in one file, outside the package: SSF, scale and shift. Lian et al. 2022,
https://arxiv.org/abs/2210.08823

    y = gamma * (W x + b) + beta,    gamma and beta of the output's size

    python examples/02_new_method.py MODEL OUTPUT [--steps 20]

MODEL is a model folder (`mlx-adapters quickstart` leaves one in quickstart/model). The script trains SSF on
generated word problems, saves the adapter, loads it again and prints the loss. Everything that makes SSF a
method stands above `main`; a method inside the package is the same lines in `mlx_adapters/methods/ssf.py`.
"""

import argparse
from pathlib import Path
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters import adapter, methods
from mlx_adapters.data import wordproblems
from mlx_adapters.data.sources import Rows
from mlx_adapters.fields import field
from mlx_adapters.methods.base import (
    AdapterLayer,
    Method,
    Site,
    dims,
    linear_like,
    plain_weight,
    resolve_targets,
)
from mlx_adapters.models import load as model
from mlx_adapters.train.trainer import Trainer


class Layer(AdapterLayer):
    """`gamma * base(x) + beta`; x is [..., in], the result [..., out]."""

    TENSORS: ClassVar[dict[str, str]] = {"gamma": "ssf_scale", "beta": "ssf_shift"}

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.gamma = mx.ones(dims(base)[1])
        self.beta = mx.zeros(dims(base)[1])

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        return (self.gamma * y + self.beta).astype(y.dtype)

    def merge(self) -> nn.Module:
        """A linear layer with the weight gamma W (row by row) and the bias gamma b + beta."""
        bias = self.gamma * self.base.bias + self.beta if "bias" in self.base else self.beta
        return linear_like(self.base, self.gamma[:, None] * plain_weight(self.base), bias)


class SSF(Method):
    """SSF: scale and shift. Lian et al. 2022, https://arxiv.org/abs/2210.08823

    y = gamma * (W x + b) + beta,    gamma and beta of the output's size
    """

    NAME = "ssf"
    TITLE = "SSF: scale and shift"
    AUTHORS = "Lian et al. 2022"
    PAPER = "https://arxiv.org/abs/2210.08823"
    PEFT_TYPE = "SSF"
    IN_PEFT = False  # PEFT has no such method: the folder's format is ours
    LAYERS = (Layer,)

    targets: str = field("all-linear", "default, attn, mlp, attn+mlp, all-linear, names a,b or re:PATTERN")
    layers: str = field("all", "all, last:N or A-B (from 0, ends included)")

    def select(self, model: nn.Module, model_type: str) -> list[str]:
        """Paths of the linear layers to wrap."""
        return resolve_targets(model, model_type, targets=self.targets, layers=self.layers)

    def wrap(self, base: nn.Module, site: Site) -> Layer:
        """The layer that takes the place of `base`."""
        return Layer(base)

    def to_peft(self) -> dict[str, Any]:
        """What `adapter_config.json` says besides the targets."""
        return {}

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> Self:
        """The method of a saved folder."""
        return cls(targets=",".join(fields["target_modules"]))


def main() -> None:
    """Register, train, save, load."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    methods.register(SSF)
    rows = Rows(wordproblems.generate(8 * options.steps, seed=0), "instruction", "generated word problems")
    loaded, settings = model.load(options.model), {"steps": options.steps, "lr": 5e-3, "template": "alpaca"}
    trainer = Trainer(loaded, rows, SSF(), output=options.output, **settings)
    print(f"{trainer.trainable:,} of {trainer.parameters:,} parameters train")
    for step in trainer:
        print(f"step {step.step}/{step.total}  loss {step.loss:.4f}")

    again = model.load(options.model)
    adapter.load(again, options.output)
    print(f"saved to {options.output} and loaded again: {len(adapter.layers(again.model))} layers")


if __name__ == "__main__":
    main()
