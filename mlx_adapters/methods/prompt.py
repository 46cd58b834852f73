"""Prompt tuning: n input embeddings in front of the text. Lester et al. 2021,
https://arxiv.org/abs/2104.08691

    h = [P_1 .. P_n, E(text)]

The virtual tokens have ids behind the vocabulary, which only the layer here understands: positions, masks,
caches and batches treat them as tokens. The text stands at position n.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import ConfigError, unknown
from mlx_adapters.fields import field
from mlx_adapters.methods.base import AdapterLayer, OnEmbedding, dims
from mlx_adapters.methods.peft_fields import COMMON, Known
from mlx_adapters.models import sites
from mlx_adapters.models.architectures.table import architecture

PEFT_TYPE = "PROMPT_TUNING"
# sizes of the model, which the table's own shape is compared with
SHAPE_FIELDS: Known = {
    **COMMON,
    **dict.fromkeys(("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers")),
    "num_transformer_submodules": (1,),
}
PEFT_FIELDS: Known = {
    **SHAPE_FIELDS,
    **dict.fromkeys(("prompt_tuning_init", "prompt_tuning_init_text")),
    **dict.fromkeys(("tokenizer_name_or_path", "tokenizer_kwargs")),
}
AUTO_MODEL = False  # transformers' load_adapter refuses prompt learning; PeftModel opens it

INITS = ("vocabulary", "random", "text")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields of `--method prompt`."""

    num_virtual_tokens: int = field(20, "how many embeddings are learned")
    init: str = field(
        "vocabulary", "vocabulary: of sampled words; text: of init_text's; random: normal(0, 1)"
    )
    init_text: str | None = field(None, "the text to start from; repeated or cut to fit")
    init_ids: str | None = field(None, "its token ids joined by commas; found by the tokenizer")

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise ConfigError(f"prompt: num_virtual_tokens={self.num_virtual_tokens} must be at least 1")
        if self.init not in INITS:
            raise ConfigError("prompt: " + unknown("init", self.init, INITS))
        if self.init == "text" and not self.init_text:
            raise ConfigError("prompt: init=text needs init_text, the text to start from")


class Table(AdapterLayer):
    """A layer whose saved form is one array: `table`, learned as it is, or what `encoded` makes of others
    until a saved one takes their place.

    `ENCODER` names the attributes that `encoded` reads.
    """

    TENSORS: ClassVar[dict[str, str]] = {"table": "prompt_embeddings"}
    ROOTED: ClassVar[bool] = True
    ENCODER: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.slot = _Slot()

    def encoded(self) -> mx.array:
        """The table as the encoder has it now."""
        raise NotImplementedError

    def now(self) -> mx.array:
        """The table; for evaluation an encoded one is computed once."""
        if "table" in self:
            return self.table
        if self.training:
            return self.encoded()
        if self.slot.value is None:
            self.slot.value = self.encoded()
        return self.slot.value

    def _set_training_mode(self, mode: bool) -> None:
        super()._set_training_mode(mode)
        self.slot.value = None  # what was computed may be of older parameters

    def tensors(self) -> dict[str, mx.array]:
        return {"table": self.table if "table" in self else self.encoded()}

    def fill(self, arrays: dict[str, mx.array]) -> None:
        for name in self.ENCODER:
            self.pop(name, None)
        self.table = arrays["table"]


class _Slot:
    """Holds an array that follows from the parameters. A plain object: on the module it would be one."""

    value: mx.array | None = None


class Virtual(Table, OnEmbedding):
    """Stands where the token embedding stood: ids behind the vocabulary are rows of the table [n, width]."""

    def __init__(self, base: nn.Module, count: int, *, divisor: float, table: mx.array | None = None) -> None:
        super().__init__()
        self.base = base
        self.count = count
        self.divisor = divisor
        if table is not None:
            self.table = table

    def __call__(self, ids: mx.array) -> mx.array:
        return embed(self.base, self.now() / self.divisor, ids)

    def virtual_ids(self) -> list[int]:
        first = self.base.weight.shape[0]
        return list(range(first, first + self.count))


Layer = Virtual


def embed(base: nn.Module, table: mx.array, ids: mx.array) -> mx.array:
    """Embeddings [.., width] of ids, in which those behind the vocabulary are rows of `table`."""
    words = base.weight.shape[0]
    virtual = ids >= words
    text = base(mx.where(virtual, 0, ids))
    rows = table[mx.clip(ids - words, 0, table.shape[0] - 1)].astype(text.dtype)
    return mx.where(virtual[..., None], rows, text)


def with_tokenizer(config: Config, tokenizer: Any) -> Config:
    """The configuration with what the tokenizer makes of `init_text`."""
    if config.init != "text" or config.init_ids:
        return config
    return replace(config, init_ids=",".join(map(str, tokenizer.encode(config.init_text))))


def place(model: nn.Module, model_type: str, config: Config, paths: list[str] | None) -> dict[str, nn.Module]:
    """The layer in the place of the token embedding."""
    path = sites.embedding(model, alone=True)
    base = dict(model.named_modules())[path]
    by = divisor(model, model_type, base)
    return {path: Virtual(base, config.num_virtual_tokens, table=_start(base, config, by), divisor=by)}


def divisor(model: nn.Module, model_type: str, base: nn.Module) -> float:
    """What the model multiplies all embeddings with, where PyTorch multiplies only those of words."""
    return math.sqrt(dims(base)[0]) if architecture(model_type).scaled_embedding else 1.0


def _start(base: nn.Module, config: Config, by: float) -> mx.array:
    n, width = config.num_virtual_tokens, dims(base)[0]
    if config.init == "random":
        return mx.random.normal((n, width))
    if config.init == "vocabulary":
        ids = mx.random.randint(0, base.weight.shape[0], (n,))
    else:
        given = [int(token) for token in (config.init_ids or "0").split(",")]
        if wrong := [token for token in given if not 0 <= token < base.weight.shape[0]]:
            raise ConfigError(
                f"prompt: init_ids: the model's embedding has rows for 0 to {base.weight.shape[0] - 1}, not "
                f"for {wrong[0]}. Choose another init_text"
            )
        ids = mx.array((given * -(-n // len(given)))[:n])
    return base(ids).astype(mx.float32) * by


def to_peft(config: Config) -> dict[str, Any]:
    """PEFT's fields for this configuration."""
    return {"num_virtual_tokens": config.num_virtual_tokens, "prompt_tuning_init": "RANDOM"}


def peft_extra(layers: dict[str, AdapterLayer], model: nn.Module, model_type: str) -> dict[str, Any]:
    """The sizes PEFT wants to know."""
    width = next(iter(layers.values())).tensors()["table"].shape[1]
    return {"token_dim": width, **shape_fields(model)}


def shape_fields(model: nn.Module) -> dict[str, Any]:
    """Layers and heads, as all of PEFT's prompt methods store them."""
    arguments = getattr(model, "args", None)
    heads = next(
        (
            v
            for name in ("num_attention_heads", "n_head", "num_heads")
            if (v := getattr(arguments, name, None))
        ),
        1,
    )
    return {
        "num_layers": len(model.layers),
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
    }


def from_peft(fields: dict[str, Any]) -> Config:
    """The configuration a PEFT `adapter_config.json` describes; the start is of no use any more."""
    return Config(num_virtual_tokens=virtual_tokens(fields), init="random")


def virtual_tokens(fields: dict[str, Any]) -> int:
    """`num_virtual_tokens` of a PEFT configuration; ConfigError where it is missing."""
    if not fields.get("task_type"):
        raise ConfigError(
            "task_type is not CAUSAL_LM: without it PEFT applies no prompt, so none was learned"
        )
    if not isinstance(number := fields.get("num_virtual_tokens"), int):
        raise ConfigError("num_virtual_tokens missing: not a PEFT configuration of a prompt method")
    return number
