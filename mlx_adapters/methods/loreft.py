"""LoReFT's layer and its options."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_adapters.errors import AdapterError, ConfigError, UnsupportedError
from mlx_adapters.fields import field
from mlx_adapters.methods.base import LAYERS_HELP, AdapterLayer, Method, Placed, dims, layer_range
from mlx_adapters.methods.dropout import Dropout
from mlx_adapters.methods.peft_fields import Fields
from mlx_adapters.models import sites
from mlx_adapters.models.architectures.row import Architecture
from mlx_adapters.models.discover import architecture_of


def orthonormal(m: mx.array) -> mx.array:
    """The rows of `m` [rank, width] made orthonormal, each by what the rows before it leave of it."""
    done = []
    for _ in range(m.shape[0]):
        row = m[0] * mx.rsqrt((m[0] * m[0]).sum())
        done.append(row)
        m = m[1:]
        m = m - (m @ row)[:, None] * row
    return mx.stack(done)


class Layer(AdapterLayer):
    """A decoder block and the edit of what it returns, [.., width]. Other attributes are the block's own:
    model files ask their blocks, for example, whether they attend within a window."""

    TENSORS: ClassVar[dict[str, str]] = {
        "rotate": "rotate_layer.weight",
        "source": "learned_source.weight",
        "source_bias": "learned_source.bias",
    }
    TARGET: ClassVar[bool] = False
    ROWWISE: ClassVar[bool] = False

    def __init__(self, base: nn.Module, *, width: int, rank: int, dropout: float) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.base = base
        self.dropout = Dropout(dropout)
        self.rotate = orthonormal(mx.random.normal((rank, width)))
        self.source = mx.random.uniform(-bound, bound, (rank, width))
        self.source_bias = mx.random.uniform(-bound, bound, (rank,))

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if "base" in self:
            return getattr(self["base"], name)
        raise AttributeError(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base(*args, **kwargs)
        if isinstance(output, mx.array):
            return self._edited(output)
        if not self._leads(output):
            raise UnsupportedError(
                f"loreft: a {type(self.base).__name__} returns its hidden state in parts. Use lora or series"
            )
        return (self._edited(output[0]), *output[1:])

    def _edited(self, h: mx.array) -> mx.array:
        r = orthonormal(self.rotate)
        edit = self.dropout(h @ (self.source - r).T + self.source_bias)
        return h + (edit @ r).astype(h.dtype)

    def _leads(self, output: Any) -> bool:
        """Whether the block returns its hidden state first, and then what later blocks read: keys, values,
        positions. What holds arrays in an object of its own may hold a part of the residual stream."""
        if not isinstance(output, tuple) or not isinstance(output[0], mx.array):
            return False
        kinds = (mx.array, int, float, type(None))
        rest = all(isinstance(leaf, kinds) for _, leaf in tree_flatten(output[1:]))
        return rest and output[0].shape[-1] == self.rotate.shape[1]


class LoReFT(Method):
    """LoReFT: the hidden state that leaves a block, edited in a low-rank subspace. Wu et al. 2024,
    https://arxiv.org/abs/2404.03592

        y = h + R^T (W h + b - R h)        R [rank, width] with orthonormal rows, W [rank, width], b [rank]

    `h` is what the decoder block returns. The edit stands on every position, of the prompt and of the answer:
    it is then a function of the token's own state, so cached generation and padded batches need nothing else.
    (The paper also tries the first and last few positions of the prompt alone; that is not offered.)

    R is trained as a matrix M whose rows are made orthonormal at every use (modified Gram-Schmidt, which is
    the QR decomposition with a positive diagonal); the file holds M, and making R from it again gives the
    same bits. As in the authors' code M starts orthonormal and W as a linear layer does: a fresh adapter is
    not the base.
    """

    NAME = "loreft"
    TITLE = "LoReFT: the hidden state that leaves a block, edited in a low-rank subspace"
    AUTHORS = "Wu et al. 2024"
    PAPER = "https://arxiv.org/abs/2404.03592"
    PEFT_TYPE = "LOREFT"
    IN_PEFT = False
    LAYERS = (Layer,)
    STANDS_ON = "blocks"

    rank: int = field(4, "directions of the hidden state that are edited")
    dropout: float = field(0.0, "dropout on the edit's coordinates while training")
    layers: str = field("all", LAYERS_HELP)

    def __post_init__(self) -> None:
        problems = []
        if self.rank < 1:
            problems.append(f"loreft: rank={self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            problems.append(f"loreft: dropout={self.dropout} must be at least 0 and below 1")
        if problems:
            raise ConfigError("; ".join(problems))

    def place(self, model: nn.Module, model_type: str, paths: list[str] | None = None) -> Placed:
        """An edit behind each chosen block."""
        modules = dict(model.named_modules())
        blocks = dict(_blocks(model, modules))
        if not blocks:
            raise UnsupportedError(f"loreft: a {model_type} model has no list of blocks. Use lora or series")
        if paths is None:
            keep = layer_range(self.layers, set(range(len(blocks))))
            paths = [path for number, path in enumerate(blocks) if number in keep]
        if strange := [path for path in paths if path not in blocks]:
            raise AdapterError(f"loreft: {strange[0]} is not a block of this {model_type} model")
        row = architecture_of(model, model_type)
        placed: Placed = {}
        for path in paths:
            width = _width(path, row, modules)
            if width is None:
                raise UnsupportedError(
                    f"loreft: no linear layer is known to lead out of {path} of a {model_type} model, "
                    "so the hidden state's size is not either. Use lora or series"
                )
            if self.rank > width:
                raise ConfigError(f"loreft: rank={self.rank} is above the hidden state's size, {width}")
            placed[path] = Layer(blocks[path], width=width, rank=self.rank, dropout=self.dropout)
        return placed

    def to_peft(self) -> Fields:
        """What our folder says of the method: no PEFT release has it."""
        return asdict(self)

    @classmethod
    def from_peft(cls, fields: Fields) -> Self:
        return cls.from_fields({name: fields[name] for name in cls.__dataclass_fields__ if name in fields})


def _blocks(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """(path, block) in the order of the model."""
    paths = {id(module): path for path, module in modules.items()}
    blocks = getattr(model, "layers", None)
    for block in blocks if isinstance(blocks, list) else []:
        if id(block) in paths:
            yield paths[id(block)], block


def _width(path: str, row: Architecture, modules: dict[str, nn.Module]) -> int | None:
    """The size of the block's hidden state: the output of a linear layer that leads back to it."""
    outs = [name for name in (row.attn_out, row.mlp_out, *row.other_outs) if name]
    inside = (p for p in modules if p.startswith(path + "."))
    out = next((p for p in inside if any(sites.matches(p, name) for name in outs)), None)
    return dims(modules[out])[1] if out else None
