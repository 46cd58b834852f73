"""LoRA on linear layers, embeddings and stacked experts, and modules trained whole beside it."""

import math
import re
from dataclasses import replace
from typing import ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import AdapterError, ConfigError, UnsupportedError
from mlx_adapters.fields import field
from mlx_adapters.methods.base import (
    LAYERS_HELP,
    AdapterLayer,
    Layers,
    Placed,
    dims,
    linear_like,
    plain_weight,
    resolve_targets,
    short_names,
)
from mlx_adapters.methods.beside import WHOLE
from mlx_adapters.methods.biases import BiasLayer, bias_of, shifted
from mlx_adapters.methods.dropout import Dropout
from mlx_adapters.methods.experts import (
    EXPERT_NAMES,
    PARTS,
    UNGATED,
    ExpertLayer,
    Experts,
    expert_paths,
    is_block,
    is_stack,
    parts,
)
from mlx_adapters.methods.low_rank import SHARED_FIELDS, LowRank
from mlx_adapters.methods.modules import EMBEDDINGS, EmbeddingLayer
from mlx_adapters.methods.patterns import as_text, parse
from mlx_adapters.methods.peft_fields import Fields
from mlx_adapters.methods.pissa import largest
from mlx_adapters.methods.tied import HEAD, HeadUpdate
from mlx_adapters.methods.tokens import HeadTokens, TokenRows
from mlx_adapters.models import sites
from mlx_adapters.models.architectures.table import architecture
from mlx_adapters.models.routers import routers


class Layer(AdapterLayer):
    """`base(x) + scale * (B A drop(x) + c)`; x is [..., in], the result [..., out] in base's dtype.

    With `bias` the base's bias is the layer's own too, with `lora_bias` there is a vector c behind B.
    """

    TENSORS: ClassVar[dict[str, str]] = {
        "lora_a": "lora_A.weight",
        "lora_b": "lora_B.weight",
        "bias": "base_layer.bias",
        "lora_c": "lora_B.bias",
    }

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        scale: float,
        dropout: float,
        pissa: bool = False,
        bias: bool = False,
        lora_bias: bool = False,
    ) -> None:
        super().__init__()
        in_dims, out_dims = dims(base)
        self.base = base
        self.scale = scale
        self.dropout = Dropout(dropout)
        self.pissa = pissa
        if pissa:
            self.lora_a, self.lora_b = largest(plain_weight(base), rank, scale)
            # a leading underscore keeps them out of the parameters: they do not train
            self._start_a, self._start_b = mx.array(self.lora_a), mx.array(self.lora_b)
        else:
            bound = 1 / math.sqrt(in_dims)
            self.lora_a = mx.random.uniform(-bound, bound, (rank, in_dims))
            self.lora_b = mx.zeros((out_dims, rank))
        if bias and "bias" in base:
            self.bias = bias_of(base)
        if lora_bias:
            self.lora_c = mx.zeros((out_dims,))

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        if "bias" in self:
            y = shifted(y, self.bias, self.base)
        if "lora_c" in self:
            y = y + (self.scale * self.lora_c).astype(y.dtype)
        dropped = self.dropout(x)
        if self.pissa and dropped is not x:
            # what the base loses it loses for the whole input
            y = y - self._update(x, self._start_a, self._start_b).astype(y.dtype)
            return y + self._update(dropped, self.lora_a, self.lora_b).astype(y.dtype)
        return y + self._update(dropped, *self._matrices()).astype(y.dtype)

    def _update(self, x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        # The narrow array [.., rank] is the cheap place to scale; the adapter computes in its own precision.
        return ((x @ a.T) * self.scale) @ b.T

    def _matrices(self) -> tuple[mx.array, mx.array]:
        if not self.pissa:
            return self.lora_a, self.lora_b
        a = mx.concatenate([self.lora_a, self._start_a])
        return a, mx.concatenate([self.lora_b, -self._start_b], axis=1)

    def tensors(self) -> dict[str, mx.array]:
        a, b = self._matrices()
        return super().tensors() | {"lora_a": a, "lora_b": b}

    def load_weights(self, arrays: dict[str, mx.array]) -> None:
        self.pissa = False  # what was saved is the whole change
        super().load_weights(arrays)

    def merge(self) -> nn.Module:
        """A plain linear layer with the weight W + scale * B A, in float32."""
        a, b = self._matrices()
        weight = plain_weight(self.base).astype(mx.float32) + self.scale * (b @ a)
        bias = self.get("bias", self.base.get("bias"))
        if "lora_c" in self:
            if bias is None:
                raise ConfigError("lora_bias adds a bias, which the base has no place for")
            bias = bias + self.scale * self.lora_c
        return linear_like(self.base, weight, bias)


class LoRA(LowRank):
    """LoRA: low-rank adaptation. Hu et al. 2021, https://arxiv.org/abs/2106.09685

        y = W x + scale * B A drop(x),    scale = alpha / rank

    A [rank, in] starts kaiming-uniform(a = sqrt 5), B [out, rank] starts at zero: a fresh adapter is the
    base.

    rslora     scale = alpha / sqrt(rank) (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)
    lora_plus  B learns that many times faster than A (Hayou et al. 2024, https://arxiv.org/abs/2402.12354)
    pissa      A and B start from the largest singular vectors of W, which the base loses (Meng et al. 2024,
               https://arxiv.org/abs/2404.02948). The base's array stays as it is: what it loses, B0 A0, is
               subtracted, so quantized bases work too. Saved as plain LoRA of twice the rank:
               [A; A0], [B, -B0].
    """

    NAME = "lora"
    TITLE = "LoRA: low-rank adaptation"
    AUTHORS = "Hu et al. 2021"
    PAPER = "https://arxiv.org/abs/2106.09685"
    PEFT_TYPE = "LORA"
    PEFT_FIELDS = {**SHARED_FIELDS, "target_parameters": None, "lora_bias": None}
    LAYERS = (
        *(Layer, Experts, ExpertLayer, EmbeddingLayer, HeadUpdate),
        *(*WHOLE, TokenRows, HeadTokens, BiasLayer),
    )

    pissa: bool = field(False, "start from the largest singular vectors of the weight")
    lora_plus: float = field(1.0, "how many times faster B learns than A")
    lora_bias: bool = field(False, "a bias behind B too, on linear layers")
    targets: str = field(
        "default", "default, attn, mlp, attn+mlp, experts, all-linear, names a,b or re:PATTERN"
    )
    layers: str = field("all", LAYERS_HELP)
    HEAD_ALONE = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.lora_plus) and self.lora_plus > 0):
            raise ConfigError(f"lora: lora_plus={self.lora_plus} must be a positive number")

    def place_layers(self, model: nn.Module, model_type: str, paths: list[str] | None) -> Placed:
        """A layer on each chosen linear layer, on the embedding and on the stacked experts."""
        modules = dict(model.named_modules())
        if paths is None:
            paths = _targets(model, model_type, self)
            self.all_matched([name for path in paths for name in _names(path, modules[path], model_type)])
        placed: Placed = {}
        tied, row = sites.tied(model), architecture(model_type)
        in_turns = row.experts is not None and row.experts.interleaved
        if HEAD in paths and HEAD not in modules:
            paths = [path for path in paths if path != HEAD]
            placed = self._tied_head(modules, sites.embedding(model), paths)
        for path in paths:
            base, sizes = modules[path], [self.at(name) for name in _names(path, modules[path], model_type)]
            placed[path] = self._layer(base, sizes, tied=tied, interleaved=in_turns)
        return placed

    def _tied_head(self, modules: dict[str, nn.Module], path: str, paths: list[str]) -> Placed:
        """An update of the output head alone, which is the embedding at `path`."""
        if path in paths:
            raise UnsupportedError(
                f"{path} is the output head too in this model: changes of both, each its own, are not read"
            )
        rank, scale = self.at(HEAD)
        return {path: HeadUpdate(modules[path], rank=rank, scale=scale)}

    def _layer(
        self, base: nn.Module, sizes: list[tuple[int, float]], *, tied: bool, interleaved: bool
    ) -> AdapterLayer:
        """The layer for `base`; `sizes` has (rank, scale) of each matrix that PEFT knows there."""
        rank, scale = sizes[0]
        if isinstance(base, EMBEDDINGS):
            return EmbeddingLayer(base, rank=rank, scale=scale, tied=tied)
        if is_block(base):
            into, out = sizes
            return Experts(base, gate_up=into, down=out, dropout=self.dropout, interleaved=interleaved)
        if is_stack(base):
            return ExpertLayer(base, rank=rank, scale=scale, dropout=self.dropout)
        return Layer(
            base,
            rank=rank,
            scale=scale,
            dropout=self.dropout,
            pissa=self.pissa,
            bias=self.bias != "none",
            lora_bias=self.lora_bias,
        )

    def lr_multipliers(self) -> dict[str, float]:
        return {} if self.lora_plus == 1 else dict.fromkeys(_STARTS_AT_ZERO, self.lora_plus)

    def as_saved(self) -> Self:
        """Of PiSSA, plain LoRA of twice the rank and the same scale."""
        if not self.pissa:
            return self
        factor = math.sqrt(2) if self.rslora else 2

        def times(text: str, name: str, by: float) -> str:
            return as_text({key: value * by for key, value in parse(text, name).items()})

        return replace(
            self,
            pissa=False,
            rank=2 * self.rank,
            alpha=factor * self.alpha,
            rank_pattern=times(self.rank_pattern, "rank_pattern", 2),
            alpha_pattern=times(self.alpha_pattern, "alpha_pattern", factor),
        )

    @classmethod
    def claims(cls, fields: Fields) -> bool:
        """Whether a LoRA configuration of PEFT is plain LoRA."""
        return not fields.get("use_dora")

    def to_peft(self) -> Fields:
        return super().to_peft() | ({"lora_bias": True} if self.lora_bias else {})

    def peft_extra(self, layers: Layers, model: nn.Module, model_type: str) -> Fields:
        """What of a mixture of experts PEFT must be told as parameters: the stacked experts, and linear
        layers whose names it would take for theirs. It has no dropout on parameters and refuses a field."""
        if not any(is_block(module) or is_stack(module) for module in model.modules()):
            return {}
        linear = {path for path, layer in layers.items() if layer.TARGET}
        chosen = routers(model).keys()
        taken = {path for path in linear if path in chosen or path.rpartition(".")[2] in EXPERT_NAMES}
        whole = [path for path, layer in layers.items() if isinstance(layer, Experts)]
        parameters = [
            f"{sites.to_hf(path, model_type)}.{part}" for path in whole for part in parts(layers[path].base)
        ]
        parameters += [f"{sites.to_hf(path, model_type)}.weight" for path in sorted(taken)]
        if not parameters:
            return {}
        names = short_names(linear - taken, model, model_type).values()
        return {"target_modules": sorted(set(names)), "target_parameters": parameters, "lora_dropout": 0.0}

    @classmethod
    def from_peft(cls, fields: Fields) -> Self:
        parameters = fields.get("target_parameters") or []
        stacks, single = "|".join({*PARTS, *UNGATED}), "|".join(("router", "router.proj", *EXPERT_NAMES))
        kinds = rf"(experts\.({stacks})|({single})\.weight)$"
        if odd := [name for name in parameters if not re.search(rf"(^|\.){kinds}", name)]:
            raise AdapterError(f"target_parameters names {odd[0]}: only the matrices of experts are read")
        shared = cls.read_peft(fields)
        if parameters:
            shared["targets"] = f"{shared['targets']},experts" if fields.get("target_modules") else "experts"
        return cls(**shared, lora_bias=bool(fields.get("lora_bias")))


_STARTS_AT_ZERO = ("lora_b", "gate_up_b", "lora_embedding_a", "head_lora_b")


def _names(path: str, module: nn.Module, model_type: str) -> list[str]:
    """What PEFT calls what is adapted at `path`, where it looks it up in a pattern."""
    name = sites.to_hf(path, model_type)
    return [f"{name}.{part}" for part in parts(module)] if is_block(module) else [name]


def _targets(model: nn.Module, model_type: str, config: LoRA) -> list[str]:
    """Paths of the linear layers, and of the embedding and the stacked experts where they are named."""
    names = [name.strip() for name in re.split(r"[,+]", config.targets)]
    if "experts" in names:
        if config.pissa:
            raise UnsupportedError("lora: pissa needs linear layers: leave experts out of the targets")
        others = replace(config, targets=",".join(name for name in names if name != "experts"))
        linear = _targets(model, model_type, others) if others.targets else []
        return linear + expert_paths(model, model_type, config.layers)
    embedding = ""
    if not config.targets.startswith("re:") and any(name in _EMBEDDING_NAMES for name in names):
        embedding = sites.embedding(model)
    left = ",".join(name for name in names if not (embedding and sites.matches(embedding, name)))
    if not left:
        return [embedding]
    linear = resolve_targets(model, model_type, targets=left, layers=config.layers, default="lora")
    return [embedding, *linear] if embedding else linear


_EMBEDDING_NAMES = ("embed_tokens", "wte", "embed_in", "word_embeddings")
