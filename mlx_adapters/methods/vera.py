"""VeRA's layer and its options."""

import math
from typing import ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import AdapterError, ConfigError
from mlx_adapters.fields import field
from mlx_adapters.methods.base import (
    LAYERS_HELP,
    TARGETS_HELP,
    AdapterLayer,
    Placed,
    dims,
    linear_like,
    peft_targets,
    plain_weight,
    resolve_targets,
)
from mlx_adapters.methods.beside import WHOLE, WithModules
from mlx_adapters.methods.dropout import Dropout
from mlx_adapters.methods.peft_fields import COMMON, Fields


class Layer(AdapterLayer):
    """`base(x) + b * B (d * A drop(x))`; x is [..., in], the result [..., out] in base's dtype."""

    TENSORS: ClassVar[dict[str, str]] = {"d": "vera_lambda_d", "b": "vera_lambda_b"}
    SHARED: ClassVar[dict[str, str]] = {"shared_a": "base_model.vera_A", "shared_b": "base_model.vera_B"}

    def __init__(
        self, base: nn.Module, *, shared_a: mx.array, shared_b: mx.array, d_initial: float, dropout: float
    ) -> None:
        super().__init__()
        self.base = base
        self.dropout = Dropout(dropout)
        self.shared_a, self.shared_b = shared_a, shared_b
        self.freeze(recurse=False, keys=["shared_a", "shared_b"])
        self.d = mx.full((shared_a.shape[0],), d_initial)
        self.b = mx.zeros((dims(base)[1],))

    def _own(self) -> tuple[mx.array, mx.array]:
        in_dims, out_dims = dims(self.base)
        return self.shared_a[:, :in_dims], self.shared_b[:out_dims]

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        a, b = self._own()
        low = (self.dropout(x) @ a.T) * self.d
        return y + ((low @ b.T) * self.b).astype(y.dtype)

    def merge(self) -> nn.Module:
        """A plain linear layer with the weight W + (b B) (d A), in float32."""
        a, b = self._own()
        update = (self.b[:, None] * b) @ (self.d[:, None] * a)
        return linear_like(self.base, plain_weight(self.base).astype(mx.float32) + update)


class VeRA(WithModules):
    """VeRA: vector-based random matrix adaptation. Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454

        y = W x + b * B (d * A drop(x))

    A [rank, in] and B [out, rank] are random, frozen and shared by all layers (each takes the rows and
    columns it needs); only the vectors d [rank] and b [out] train. d starts at `d_initial` and b at zero: a
    fresh adapter is the base. The shared matrices are saved with the adapter: PyTorch's random numbers cannot
    be repeated here.
    """

    NAME = "vera"
    TITLE = "VeRA: vector-based random matrix adaptation"
    AUTHORS = "Kopiczko et al. 2023"
    PAPER = "https://arxiv.org/abs/2310.11454"
    PEFT_TYPE = "VERA"
    PEFT_FIELDS = {
        **COMMON,
        **dict.fromkeys(("r", "vera_dropout", "d_initial", "init_weights")),
        **dict.fromkeys(("projection_prng_key", "save_projection")),
        "bias": ("none",),
        "modules_to_save": None,
    }
    AUTO_MODEL = False  # transformers' load_adapter refuses VeRA; PeftModel opens it
    LAYERS = (Layer, *WHOLE)

    rank: int = field(256, "rank of the shared random matrices")
    d_initial: float = field(0.1, "where the vector d starts")
    dropout: float = field(0.0, "dropout on the input of A while training")
    projection_seed: int = field(0, "seed of the shared random matrices")
    targets: str = field("default", TARGETS_HELP)
    layers: str = field("all", LAYERS_HELP)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"vera: rank={self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"vera: dropout={self.dropout} must be at least 0 and below 1")

    def place_layers(self, model: nn.Module, model_type: str, paths: list[str] | None) -> Placed:
        """A layer on each chosen linear layer, all with the same matrices, as large as the largest needs."""
        if paths is None:
            paths = resolve_targets(model, model_type, targets=self.targets, layers=self.layers)
        modules = dict(model.named_modules())
        sizes = [dims(modules[path]) for path in paths]
        in_dims, out_dims = max(size[0] for size in sizes), max(size[1] for size in sizes)
        first, second = mx.random.split(mx.random.key(self.projection_seed))
        a, b = _random((self.rank, in_dims), first), _random((out_dims, self.rank), second)
        return {
            path: Layer(modules[path], shared_a=a, shared_b=b, d_initial=self.d_initial, dropout=self.dropout)
            for path in paths
        }

    def to_peft(self) -> Fields:
        return {
            "r": self.rank,
            "vera_dropout": self.dropout,
            "d_initial": self.d_initial,
            "projection_prng_key": self.projection_seed,
            "save_projection": True,
            "fan_in_fan_out": False,
            "bias": "none",
            **self.modules_field(),
        }

    @classmethod
    def from_peft(cls, fields: Fields) -> Self:
        if fields.get("save_projection") is False:
            raise AdapterError(
                "save_projection=false: the random matrices are not in the file, and only PyTorch can make "
                "them again. Save it in PEFT with save_projection=True"
            )
        if "r" not in fields:
            raise AdapterError("r missing: not a PEFT VeRA configuration")
        return cls(
            rank=fields["r"],
            d_initial=fields.get("d_initial", 0.1),
            dropout=float(fields.get("vera_dropout") or 0.0),
            projection_seed=fields.get("projection_prng_key") or 0,
            targets=peft_targets(fields),
            **cls.read_modules(fields),
        )


def _random(shape: tuple[int, int], key: mx.array) -> mx.array:
    """Kaiming-uniform for the fan-in: the product of both matrices keeps the size of x."""
    bound = math.sqrt(6 / shape[1])
    return mx.random.uniform(-bound, bound, shape, key=key)
