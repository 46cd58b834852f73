"""Prompt tuning's layer and options, and the table of virtual tokens that the other prompt methods share."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import ConfigError, unknown
from mlx_adapters.fields import field
from mlx_adapters.methods.base import AdapterLayer, Layers, Method, OnEmbedding, Placed, dims
from mlx_adapters.methods.peft_fields import COMMON, Fields, Known
from mlx_adapters.models import sites
from mlx_adapters.models.architectures.table import architecture

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# sizes of the model, which the table's own shape is compared with
SHAPE_FIELDS: Known = {
    **COMMON,
    **dict.fromkeys(("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers")),
    "num_transformer_submodules": (1,),
}
INITS = ("vocabulary", "random", "text")


class PromptTable(AdapterLayer):
    """A layer whose saved form is one array: a learned `table`, or the output of an encoder (the attributes
    that `ENCODER` names) that is replaced by its table on load."""

    TENSORS: ClassVar[dict[str, str]] = {"table": "prompt_embeddings"}
    ROOTED: ClassVar[bool] = True
    ENCODER: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.slot = _Cache()

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

    def load_weights(self, arrays: dict[str, mx.array]) -> None:
        for name in self.ENCODER:
            self.pop(name, None)
        self.table = arrays["table"]


class _Cache:
    """Holds an array that follows from the parameters. A plain object: on the module it would be one."""

    value: mx.array | None = None


class SoftPrompt(PromptTable, OnEmbedding):
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


def embed(base: nn.Module, table: mx.array, ids: mx.array) -> mx.array:
    """Embeddings [.., width] of ids, in which those behind the vocabulary are rows of `table`."""
    vocabulary = base.weight.shape[0]
    virtual = ids >= vocabulary
    text = base(mx.where(virtual, 0, ids))
    rows = table[mx.clip(ids - vocabulary, 0, table.shape[0] - 1)].astype(text.dtype)
    return mx.where(virtual[..., None], rows, text)


def divisor(model: nn.Module, model_type: str, base: nn.Module) -> float:
    """What the model multiplies all embeddings with, where PyTorch multiplies only those of words."""
    return math.sqrt(dims(base)[0]) if architecture(model_type).scaled_embedding else 1.0


class Prompt(Method):
    """Prompt tuning: n input embeddings in front of the text. Lester et al. 2021,
    https://arxiv.org/abs/2104.08691

        h = [P_1 .. P_n, E(text)]

    The virtual tokens have ids behind the vocabulary, which only the layer here understands: positions,
    masks, caches and batches treat them as tokens. The text stands at position n.
    """

    NAME = "prompt"
    TITLE = "Prompt tuning: n input embeddings in front of the text"
    AUTHORS = "Lester et al. 2021"
    PAPER = "https://arxiv.org/abs/2104.08691"
    PEFT_TYPE = "PROMPT_TUNING"
    PEFT_FIELDS = {
        **SHAPE_FIELDS,
        **dict.fromkeys(("prompt_tuning_init", "prompt_tuning_init_text")),
        **dict.fromkeys(("tokenizer_name_or_path", "tokenizer_kwargs")),
    }
    AUTO_MODEL = False  # transformers' load_adapter refuses prompt learning; PeftModel opens it
    LAYERS = (SoftPrompt,)
    STANDS_ON = "the embedding"

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

    def with_tokenizer(self, tokenizer: "TokenizerWrapper") -> Self:
        """With the token ids of `init_text`."""
        if self.init != "text" or self.init_ids:
            return self
        return replace(self, init_ids=",".join(map(str, tokenizer.encode(self.init_text))))

    def place(self, model: nn.Module, model_type: str, paths: list[str] | None = None) -> Placed:
        """The layer in the place of the token embedding."""
        path = sites.embedding(model, alone=True)
        base = dict(model.named_modules())[path]
        by = divisor(model, model_type, base)
        return {path: SoftPrompt(base, self.num_virtual_tokens, table=_start(base, self, by), divisor=by)}

    def to_peft(self) -> Fields:
        return {"num_virtual_tokens": self.num_virtual_tokens, "prompt_tuning_init": "RANDOM"}

    def peft_extra(self, layers: Layers, model: nn.Module, model_type: str) -> Fields:
        """The sizes that PEFT wants to know."""
        return {"token_dim": table_width(layers), **shape_fields(model)}

    @classmethod
    def from_peft(cls, fields: Fields) -> Self:
        """The start is of no use any more."""
        return cls(num_virtual_tokens=virtual_tokens(fields), init="random")


def _start(base: nn.Module, config: Prompt, by: float) -> mx.array:
    n, width = config.num_virtual_tokens, dims(base)[0]
    if config.init == "random":
        return mx.random.normal((n, width))
    if config.init == "vocabulary":
        ids = mx.random.randint(0, base.weight.shape[0], (n,))
    else:
        start = [int(token) for token in (config.init_ids or "0").split(",")]
        if wrong := [token for token in start if not 0 <= token < base.weight.shape[0]]:
            raise ConfigError(
                f"prompt: init_ids: the model's embedding has rows for 0 to {base.weight.shape[0] - 1}, not "
                f"for {wrong[0]}. Choose another init_text"
            )
        ids = mx.array((start * -(-n // len(start)))[:n])
    return base(ids).astype(mx.float32) * by


def table_width(layers: Layers) -> int:
    """The size of one virtual token of the saved table."""
    return next(iter(layers.values())).tensors()["table"].shape[1]


def shape_fields(model: nn.Module) -> Fields:
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


def virtual_tokens(fields: Fields) -> int:
    """`num_virtual_tokens` of a PEFT configuration; ConfigError where it is missing."""
    if not fields.get("task_type"):
        raise ConfigError(
            "task_type is not CAUSAL_LM: without it PEFT applies no prompt, so none was learned"
        )
    if not isinstance(number := fields.get("num_virtual_tokens"), int):
        raise ConfigError("num_virtual_tokens missing: not a PEFT configuration of a prompt method")
    return number
