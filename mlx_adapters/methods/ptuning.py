"""P-tuning's layer, its encoders and its options."""

from typing import ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters.errors import ConfigError, unknown
from mlx_adapters.fields import field
from mlx_adapters.methods import prompt
from mlx_adapters.methods.base import Layers, Method, Placed, dims
from mlx_adapters.methods.dropout import Dropout
from mlx_adapters.methods.peft_fields import Fields
from mlx_adapters.models import sites

ENCODERS = ("MLP", "LSTM")


class MLP(nn.Module):
    """[n, width] -> [n, width] through two hidden layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = [nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, width)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers[:-1]:
            x = nn.relu(layer(x))
        return self.layers[-1](x)


class LSTM(nn.Module):
    """[n, width] -> [n, width]: the n rows are the steps of a bidirectional LSTM, an MLP stands behind it."""

    def __init__(self, width: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        sizes = [width] + [2 * hidden] * (layers - 1)
        self.forwards = [nn.LSTM(size, hidden) for size in sizes]
        self.backwards = [nn.LSTM(size, hidden) for size in sizes]
        self.dropout = Dropout(dropout)
        self.head = [nn.Linear(2 * hidden, 2 * hidden), nn.Linear(2 * hidden, width)]

    def __call__(self, x: mx.array) -> mx.array:
        for index, (there, back) in enumerate(zip(self.forwards, self.backwards, strict=True)):
            x = self.dropout(x) if index else x
            x = mx.concatenate([there(x)[0], back(x[::-1])[0][::-1]], axis=-1)
        return self.head[1](nn.relu(self.head[0](x)))


class Layer(prompt.SoftPrompt):
    """Stands where the token embedding stood; ids behind the vocabulary are rows of encoder(seeds)."""

    ENCODER: ClassVar[tuple[str, ...]] = ("encoder", "seeds")

    def __init__(
        self, base: nn.Module, encoder: nn.Module, count: int, width: int, *, divisor: float
    ) -> None:
        super().__init__(base, count, divisor=divisor)
        self.encoder = encoder
        self.seeds = mx.random.normal((count, width))

    def encoded(self) -> mx.array:
        return self.encoder(self.seeds)


class PTuning(Method):
    """P-tuning: n input embeddings, the output of a small network. Liu et al. 2021,
    https://arxiv.org/abs/2103.10385

        h = [P_1 .. P_n, E(text)],    P = encoder(S),    S [n, width] learned

    The encoder is an MLP of three linear layers with ReLU between them, or a bidirectional LSTM with an MLP
    of two behind it. Only P is saved, as in PEFT: training a loaded adapter further trains P itself. A
    run that resumes from its checkpoint continues with the encoder.
    """

    NAME = "ptuning"
    TITLE = "P-tuning: n input embeddings, the output of a small network"
    AUTHORS = "Liu et al. 2021"
    PAPER = "https://arxiv.org/abs/2103.10385"
    PEFT_TYPE = "P_TUNING"
    PEFT_FIELDS = {
        **prompt.SHAPE_FIELDS,
        **dict.fromkeys(("encoder_reparameterization_type", "encoder_hidden_size")),
        **dict.fromkeys(("encoder_num_layers", "encoder_dropout")),
    }
    AUTO_MODEL = False  # transformers' load_adapter refuses prompt learning; PeftModel opens it
    LAYERS = (Layer,)
    STANDS_ON = "the embedding"

    num_virtual_tokens: int = field(20, "how many embeddings are learned")
    encoder: str = field("MLP", "MLP or LSTM")
    encoder_hidden_size: int | None = field(None, "width of the encoder [default: the model's]")
    encoder_layers: int = field(2, "layers of the LSTM; the MLP has three")
    dropout: float = field(0.0, "dropout between the layers of the LSTM while training")

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1 or self.encoder_layers < 1:
            raise ConfigError("ptuning: num_virtual_tokens and encoder_layers must be at least 1")
        if self.encoder not in ENCODERS:
            raise ConfigError("ptuning: " + unknown("encoder", self.encoder, ENCODERS))
        if self.encoder_hidden_size is not None and self.encoder_hidden_size < 1:
            raise ConfigError(f"ptuning: encoder_hidden_size={self.encoder_hidden_size} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"ptuning: dropout={self.dropout} must be at least 0 and below 1")

    def place(self, model: nn.Module, model_type: str, paths: list[str] | None = None) -> Placed:
        """The layer in the place of the token embedding."""
        path = sites.embedding(model, alone=True)
        base = dict(model.named_modules())[path]
        width = dims(base)[0]
        hidden = self.encoder_hidden_size or width
        encoder = (
            MLP(width, hidden)
            if self.encoder == "MLP"
            else LSTM(width, hidden, self.encoder_layers, self.dropout)
        )
        by = prompt.divisor(model, model_type, base)
        return {path: Layer(base, encoder, self.num_virtual_tokens, width, divisor=by)}

    def to_peft(self) -> Fields:
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "encoder_reparameterization_type": self.encoder,
            "encoder_hidden_size": self.encoder_hidden_size,
            "encoder_num_layers": self.encoder_layers,
            "encoder_dropout": self.dropout,
        }

    def peft_extra(self, layers: Layers, model: nn.Module, model_type: str) -> Fields:
        """The sizes that PEFT wants to know; a loaded table has no encoder, whose width is made up."""
        width = prompt.table_width(layers)
        loaded = "table" in next(iter(layers.values()))
        hidden = {"encoder_hidden_size": width} if loaded else {}
        return {"token_dim": width, **prompt.shape_fields(model), **hidden}

    @classmethod
    def from_peft(cls, fields: Fields) -> Self:
        return cls(
            num_virtual_tokens=prompt.virtual_tokens(fields),
            encoder=fields.get("encoder_reparameterization_type") or "MLP",
            encoder_hidden_size=fields.get("encoder_hidden_size"),
            encoder_layers=fields.get("encoder_num_layers") or 2,
            dropout=float(fields.get("encoder_dropout") or 0.0),
        )
