"""What LoRA and DoRA share: their options, PEFT's fields for them, and what may be trained beside them."""

import math
from typing import Any

import mlx.nn as nn

from mlx_adapters.errors import AdapterError, ConfigError, UnsupportedError, unknown
from mlx_adapters.fields import field
from mlx_adapters.methods import tokens
from mlx_adapters.methods.base import Placed, peft_targets
from mlx_adapters.methods.beside import WithModules
from mlx_adapters.methods.biases import BIASES, BiasLayer, biased
from mlx_adapters.methods.modules import EMBEDDINGS
from mlx_adapters.methods.patterns import as_text, fits, matching, parse
from mlx_adapters.methods.peft_fields import COMMON, Fields, Known
from mlx_adapters.methods.tied import HEAD, HeadUpdate
from mlx_adapters.models import sites

__all__ = ["SHARED_FIELDS", "LowRank"]

# What LoRA and DoRA read of PEFT's configuration, or may leave alone.
SHARED_FIELDS: Known = {
    **COMMON,
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "use_rslora")),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices")),
    "bias": BIASES,
    "ensure_weight_tying": None,  # the file holds both matrices then
    # these leave the base alone; pissa, olora, corda, lora_ga and loftq start from what they take out of it
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),
    # settings of such starts, of GPTQ's and Megatron's layers and of moving memory: nothing is left of them
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config", "loftq_config", "runtime_config")),
    **dict.fromkeys(("megatron_config", "megatron_core", "qalora_group_size")),
    # of PEFT 0.3 and the code of LLM-Adapters
    "merge_weights": None,
}


class LowRank(WithModules):
    """The options of LoRA and DoRA, and their fields in PEFT's configuration."""

    rank: int = field(8, "rank r of the update B A")
    alpha: float = field(16.0, "numerator of the scale alpha / rank")
    dropout: float = field(0.0, "dropout on the input of A while training")
    rslora: bool = field(False, "scale by alpha / sqrt(rank) instead")
    rank_pattern: str = field("", "other ranks for some layers: q_proj=16,mlp.down_proj=4")
    alpha_pattern: str = field("", "other alphas for some layers, written the same way")
    bias: str = field("none", "biases of the base that train too: none, lora_only (of the targets) or all")
    trainable_tokens: str = field(
        "", "ids of tokens whose embeddings train: 4,9, or by module: embed_tokens=4,9;lm_head=4,9"
    )

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"{self.NAME}: rank={self.rank} must be at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"{self.NAME}: alpha={self.alpha} must be a positive number")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{self.NAME}: dropout={self.dropout} must be at least 0 and below 1")
        if self.bias not in BIASES:
            raise ConfigError(f"{self.NAME}: " + unknown("bias", self.bias, BIASES))
        tokens.parse(self.trainable_tokens)
        parse(self.alpha_pattern, "alpha_pattern")
        if odd := [v for v in parse(self.rank_pattern, "rank_pattern").values() if v != int(v)]:
            raise ConfigError(
                f"{self.NAME}: rank_pattern={self.rank_pattern!r}: rank {odd[0]} is no whole number"
            )

    @property
    def scale(self) -> float:
        """The factor in front of B A where no pattern says otherwise."""
        return self._scale(self.alpha, self.rank)

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def at(self, path: str) -> tuple[int, float]:
        """(rank, scale) of the layer at a Hugging Face path."""
        rank = int(matching(self.rank_pattern, "rank_pattern", path) or self.rank)
        alpha = matching(self.alpha_pattern, "alpha_pattern", path) or self.alpha
        return rank, self._scale(alpha, rank)

    def place(self, model: nn.Module, model_type: str, paths: list[str] | None = None) -> Placed:
        """The low-rank layers, and the modules, tokens and biases that train beside them."""
        whole, rows = super().beside(model, model_type), self._rows(model, model_type)
        own = self.place_layers(model, model_type, self.others(paths, whole | rows, model))
        if both := [path for path in whole | rows if isinstance(own.get(path), HeadUpdate)]:
            raise UnsupportedError(
                f"{both[0]} is the output head too in this model: changes of both, each its own, are not read"
            )
        if twice := sorted((own.keys() | whole.keys()) & rows.keys()):
            raise ConfigError(f"{self.NAME}: trainable_tokens: {twice[0]} is adapted as a whole too")
        placed = own | whole | rows
        if self.bias != "all":
            return placed
        return placed | {p: BiasLayer(m) for p, m in biased(model).items() if p not in placed}

    def _rows(self, model: nn.Module, model_type: str) -> Placed:
        """A layer with rows of its own at each module that `trainable_tokens` names."""
        modules, placed = dict(model.named_modules()), dict[str, nn.Module]()
        chosen = tokens.parse(self.trainable_tokens)
        apart = len({tuple(ids) for ids in chosen.values()}) > 1 or list(chosen) == [HEAD]
        if apart and sites.tied(model):
            raise UnsupportedError(
                f"{self.NAME}: trainable_tokens of the head alone, which is the embedding here, are not read"
            )
        for name, ids in chosen.items():
            named = {p for p in modules if p and name and sites.to_hf(p, model_type).endswith(name)}
            for path in sorted(named) if name else [sites.embedding(model)]:
                if isinstance(modules[path], EMBEDDINGS):
                    placed[path] = tokens.TokenRows(modules[path], ids)
                elif sites.is_head(path) and "bias" not in modules[path]:
                    placed[path] = tokens.HeadTokens(modules[path], ids)
                else:  # PEFT loses a bias there
                    raise UnsupportedError(
                        f"{self.NAME}: trainable_tokens: {path} is no embedding, nor a head without bias"
                    )
            if name and not named and not sites.tied(model):
                raise ConfigError(f"{self.NAME}: trainable_tokens names {name}, which is not in this model")
        return placed

    def all_matched(self, paths: list[str]) -> None:
        """ConfigError for a pattern that fits none of these Hugging Face paths."""
        for name, text in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key in parse(text, name):
                if not any(fits(key, path) for path in paths):
                    raise ConfigError(f"{self.NAME}: {name}: {key!r} matches no target")

    def to_peft(self) -> Fields:
        """Only what every PEFT since 0.4 knows, more only where needed."""
        fields: Fields = {
            "r": self.rank,
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "bias": self.bias,
            "fan_in_fan_out": False,
            **self.modules_field(),
        }
        if self.rslora:
            fields["use_rslora"] = True
        if self.rank_pattern:
            fields["rank_pattern"] = {k: int(v) for k, v in parse(self.rank_pattern, "rank_pattern").items()}
        if self.alpha_pattern:
            fields["alpha_pattern"] = parse(self.alpha_pattern, "alpha_pattern")
        if named := tokens.parse(self.trainable_tokens):
            fields["trainable_token_indices"] = named[""] if list(named) == [""] else named
        return fields

    @classmethod
    def read_peft(cls, fields: Fields) -> dict[str, Any]:
        """Our options of PEFT's fields that LoRA and DoRA share."""
        missing = [name for name in ("r", "lora_alpha") if name not in fields]
        if missing:
            raise AdapterError(f"{' and '.join(missing)} missing: not a PEFT LoRA configuration")
        return {
            "rank": fields["r"],
            "alpha": float(fields["lora_alpha"]),
            "dropout": float(fields.get("lora_dropout") or 0.0),
            "rslora": bool(fields.get("use_rslora", False)),
            "rank_pattern": as_text(fields.get("rank_pattern") or {}),
            "alpha_pattern": as_text(fields.get("alpha_pattern") or {}),
            "bias": fields.get("bias") or "none",
            "trainable_tokens": tokens.as_text(fields.get("trainable_token_indices")),
            "targets": peft_targets(fields),
            **cls.read_modules(fields),
        }
