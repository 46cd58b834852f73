"""LoRA on linear layers, embeddings and stacked experts, and modules trained whole beside it."""

import math
import re
from dataclasses import replace
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import AdapterError, ConfigError, UnsupportedError
from mlx_adapters.fields import field
from mlx_adapters.methods.base import (
    LAYERS_HELP,
    AdapterLayer,
    Layers,
    Method,
    Placed,
    dims,
    linear_like,
    peft_targets,
    plain_weight,
    resolve_targets,
    short_names,
)
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
from mlx_adapters.methods.modules import EMBEDDINGS, EmbeddingLayer, ModulesToSave, NormToSave, module_to_save
from mlx_adapters.methods.patterns import as_text, fits, matching, parse
from mlx_adapters.methods.peft_fields import COMMON, Fields, Known
from mlx_adapters.methods.pissa import largest
from mlx_adapters.models import sites
from mlx_adapters.models.architectures.table import architecture
from mlx_adapters.models.routers import routers

# What LoRA and DoRA read of PEFT's configuration, or may leave alone.
SHARED_FIELDS: Known = {
    **COMMON,
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "use_rslora")),
    "bias": ("none",),
    # these leave the base alone; pissa, olora, corda, lora_ga and loftq start from what they take out of it
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),
    # settings of such starts, of GPTQ's and Megatron's layers and of moving memory: nothing is left of them
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config", "loftq_config", "runtime_config")),
    **dict.fromkeys(("megatron_config", "megatron_core", "qalora_group_size")),
    # of PEFT 0.3 and the code of LLM-Adapters
    "merge_weights": None,
}


class Layer(AdapterLayer):
    """`base(x) + scale * B A drop(x)`; x is [..., in], the result [..., out] in base's dtype."""

    TENSORS: ClassVar[dict[str, str]] = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}

    def __init__(
        self, base: nn.Module, *, rank: int, scale: float, dropout: float, pissa: bool = False
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

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
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
        return {"lora_a": a, "lora_b": b}

    def load_weights(self, arrays: dict[str, mx.array]) -> None:
        self.pissa = False  # what was saved is the whole change
        self.lora_a, self.lora_b = arrays["lora_a"], arrays["lora_b"]

    def merge(self) -> nn.Module:
        """A plain linear layer with the weight W + scale * B A, in float32."""
        a, b = self._matrices()
        return linear_like(self.base, plain_weight(self.base).astype(mx.float32) + self.scale * (b @ a))


class LowRank(Method):
    """The options of LoRA and DoRA, and their fields in PEFT's configuration."""

    rank: int = field(8, "rank r of the update B A")
    alpha: float = field(16.0, "numerator of the scale alpha / rank")
    dropout: float = field(0.0, "dropout on the input of A while training")
    rslora: bool = field(False, "scale by alpha / sqrt(rank) instead")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"{self.NAME}: rank={self.rank} must be at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"{self.NAME}: alpha={self.alpha} must be a positive number")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{self.NAME}: dropout={self.dropout} must be at least 0 and below 1")

    @property
    def scale(self) -> float:
        """The factor in front of B A where no pattern says otherwise."""
        return self._scale(self.alpha, self.rank)

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def at(self, path: str) -> tuple[int, float]:
        """(rank, scale) of the layer at a Hugging Face path."""
        return self.rank, self.scale

    def to_peft(self) -> Fields:
        """Only what every PEFT since 0.4 knows, more only where needed."""
        fields: Fields = {
            "r": self.rank,
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "bias": "none",
            "fan_in_fan_out": False,
            "modules_to_save": None,
        }
        if self.rslora:
            fields["use_rslora"] = True
        return fields

    @staticmethod
    def read_peft(fields: Fields) -> Fields:
        """Our options of PEFT's fields that LoRA and DoRA share."""
        missing = [name for name in ("r", "lora_alpha") if name not in fields]
        if missing:
            raise AdapterError(f"{' and '.join(missing)} missing: not a PEFT LoRA configuration")
        return {
            "rank": fields["r"],
            "alpha": float(fields["lora_alpha"]),
            "dropout": float(fields.get("lora_dropout") or 0.0),
            "rslora": bool(fields.get("use_rslora", False)),
            "targets": peft_targets(fields),
        }


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
    PEFT_FIELDS = {
        **SHARED_FIELDS,
        **dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters")),
    }
    LAYERS = (Layer, Experts, ExpertLayer, EmbeddingLayer, ModulesToSave, NormToSave)

    pissa: bool = field(False, "start from the largest singular vectors of the weight")
    lora_plus: float = field(1.0, "how many times faster B learns than A")
    rank_pattern: str = field("", "other ranks for some layers: q_proj=16,mlp.down_proj=4")
    alpha_pattern: str = field("", "other alphas for some layers, written the same way")
    modules_to_save: str = field("", "names of modules trained whole, as lm_head or embed_tokens")
    targets: str = field(
        "default", "default, attn, mlp, attn+mlp, experts, all-linear, names a,b or re:PATTERN"
    )
    layers: str = field("all", LAYERS_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.lora_plus) and self.lora_plus > 0):
            raise ConfigError(f"lora: lora_plus={self.lora_plus} must be a positive number")
        parse(self.alpha_pattern, "alpha_pattern")
        if odd := [v for v in parse(self.rank_pattern, "rank_pattern").values() if v != int(v)]:
            raise ConfigError(f"lora: rank_pattern={self.rank_pattern!r}: rank {odd[0]} is no whole number")

    def at(self, path: str) -> tuple[int, float]:
        """(rank, scale) of the layer at a Hugging Face path."""
        rank = int(matching(self.rank_pattern, "rank_pattern", path) or self.rank)
        alpha = matching(self.alpha_pattern, "alpha_pattern", path) or self.alpha
        return rank, self._scale(alpha, rank)

    def place(self, model: nn.Module, model_type: str, paths: list[str] | None = None) -> Placed:
        """A layer on each chosen linear layer and on the embedding, and the modules to be trained whole."""
        modules = dict(model.named_modules())
        whole = _whole(modules, self, model_type)
        if paths is None:
            paths = [*_targets(model, model_type, self), *whole]
            _all_matched(self, [name for path in paths for name in _names(path, modules[path], model_type)])
        placed: Placed = {}
        row = architecture(model_type)
        in_turns = row.experts is not None and row.experts.interleaved
        for path in paths:
            base, sizes = modules[path], [self.at(name) for name in _names(path, modules[path], model_type)]
            if path in whole:
                _refuse_tied(model, path, isinstance(base, EMBEDDINGS))
                placed[path] = module_to_save(base, path)
            else:
                placed[path] = self._layer(base, sizes, tied=sites.tied(model), interleaved=in_turns)
        return placed

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
        return Layer(base, rank=rank, scale=scale, dropout=self.dropout, pissa=self.pissa)

    def lr_multipliers(self) -> dict[str, float]:
        return {} if self.lora_plus == 1 else dict.fromkeys(_STARTS_AT_ZERO, self.lora_plus)

    def whole_modules(self) -> str | None:
        return self.modules_to_save

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
        fields = super().to_peft()
        if self.rank_pattern:
            fields["rank_pattern"] = {k: int(v) for k, v in parse(self.rank_pattern, "rank_pattern").items()}
        if self.alpha_pattern:
            fields["alpha_pattern"] = parse(self.alpha_pattern, "alpha_pattern")
        if self.modules_to_save:
            fields["modules_to_save"] = [name.strip() for name in self.modules_to_save.split(",")]
        return fields

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
        own: dict[str, Any] = {
            name: as_text(fields.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")
        }
        whole = fields.get("modules_to_save") or []
        if not isinstance(whole, list):
            raise AdapterError(f"modules_to_save={whole!r} is not a list of names")
        own["modules_to_save"] = ",".join(whole)
        parameters = fields.get("target_parameters") or []
        stacks, single = "|".join({*PARTS, *UNGATED}), "|".join(("router", "router.proj", *EXPERT_NAMES))
        kinds = rf"(experts\.({stacks})|({single})\.weight)$"
        if odd := [name for name in parameters if not re.search(rf"(^|\.){kinds}", name)]:
            raise AdapterError(f"target_parameters names {odd[0]}: only the matrices of experts are read")
        shared = cls.read_peft(fields)
        if parameters:
            shared["targets"] = f"{shared['targets']},experts" if fields.get("target_modules") else "experts"
        return cls(**shared, **own)


_STARTS_AT_ZERO = ("lora_b", "gate_up_b", "lora_embedding_a")


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


def _all_matched(config: LoRA, paths: list[str]) -> None:
    for name, text in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in parse(text, name):
            if not any(fits(key, path) for path in paths):
                raise ConfigError(f"lora: {name}: {key!r} matches no target")


def _whole(modules: dict[str, nn.Module], config: LoRA, model_type: str) -> list[str]:
    names = [name.strip() for name in config.modules_to_save.split(",") if name.strip()]
    # PEFT's rule: a name is the end of a path, and "norm" names every input_layernorm too
    found = {n: [p for p in modules if sites.to_hf(p, model_type).endswith(n)] for n in names}
    if missing := [name for name, paths in found.items() if not paths]:
        raise ConfigError(
            f"lora: modules_to_save names {', '.join(missing)}, which this {model_type} model does not have"
            " (a tied output head is the embedding)"
        )
    if "embed_out" in found:
        raise UnsupportedError(
            "modules_to_save: transformers 4 calls GPT-NeoX's head embed_out and transformers 5 lm_head, so "
            "no adapter file fits both"
        )
    return [path for paths in found.values() for path in paths]


def _refuse_tied(model: nn.Module, path: str, embeds: bool) -> None:
    if embeds and sites.tied(model):
        raise UnsupportedError(
            f"modules_to_save: {path} is the output head too in this model, and PyTorch would train only one "
            "of the two. Use LoRA on the embedding: targets=embed_tokens,..."
        )
