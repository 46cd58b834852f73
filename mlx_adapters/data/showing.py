"""What a preview of training data is asked, and what it answers.

Imports nothing heavy: the command line makes its options of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_adapters.errors import ConfigError, unknown
from mlx_adapters.fields import field
from mlx_adapters.files.streams import plain

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["LONG_ROWS", "LOSS_ON", "Preview", "Shown", "Statistics", "in_colour", "in_marks"]

LOSS_ON = ("completion", "last", "all")
LONG_ROWS = ("cut", "left", "split", "drop")
"""What becomes of rows longer than the max length: see `data/long_rows.py`."""
# How the kinds of pieces are told apart, with colours and without. Of the eight colours magenta is the only
# one that the common palettes show clearly on white and on black; what is cut is dim, in brackets.
_STYLES = {"learned": "bold magenta", "cut": "dim"}
_MARKS = {"context": "{}", "learned": "⟦{}⟧", "cut": "⟨cut: {}⟩"}


@dataclass(frozen=True, kw_only=True)
class Preview:
    """How rows would be trained; the defaults are those of training."""

    template: str | None = field(
        None, "alpaca, llm-adapters, chat, plain or a FILE.jinja [default: as training chooses]"
    )
    chat_template_kwargs: str | None = field(None, "as `train --chat-template-kwargs`")
    loss_on: str = field("completion", "as `train --loss-on`: completion, last or all")
    columns: str | None = field(None, "as `train --columns`: names of the rows' fields")
    max_length: int | None = field(
        None, "longest row in tokens, as `train --max-length` [default: the model's]", "cutoff"
    )
    long_rows: str = field("cut", "as `train --long-rows`: cut, left, split or drop")
    rows: int = field(3, "how many rows are shown")

    def __post_init__(self) -> None:
        for name, least in (("max_length", 2), ("rows", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name}={value} must be at least {least}")
        if self.long_rows not in LONG_ROWS:
            raise ConfigError(unknown("value of long-rows", self.long_rows, LONG_ROWS))


@dataclass(frozen=True)
class Shown:
    """A row as it is trained, or one of the chunks that it is split into.

    `pieces` are (text, kind) in order; the kind is `context`, `learned`, or `cut` for what the max length
    leaves out. Special tokens stand in the text as they are. `tokens` counts all, and `supervised` those that
    have a label. Printed, what is learned stands in ⟦ ⟧ and what is cut in ⟨cut: ⟩.
    """

    row: int
    pieces: list[tuple[str, str]]
    tokens: int
    supervised: int

    def __str__(self) -> str:
        return f"{self.head}\n" + "".join(_MARKS[kind].format(text) for text, kind in self.pieces)

    @property
    def head(self) -> str:
        """The row's number and its tokens."""
        return f"row {self.row}: {self.tokens} tokens, {self.supervised} supervised"


@dataclass(frozen=True)
class Statistics:
    """What `rows` become. Lengths are in tokens.

    Attributes:
        rows: in the source.
        examples: what is trained on; a chat may become several.
        template: the prompt template.
        tokens: of all examples, whole.
        supervised: those of them with a label.
        lengths: {percentile: length}; `100` is the longest.
        histogram: [(longest, examples up to it and above the one before)].
        cut: {max length: share of the examples that are longer}.
        long: examples that are longer than `max_length`.
        max_length: as asked for, else what the model was made for, else the longest example.
        long_rows: in words, what becomes of the long ones; empty where there is none.
        repeated: rows that are the same as an earlier one.
        empty: rows with an empty answer.
        suggested_max_length: keeps 99 % of the examples whole, within what the model can read.
    """

    rows: int
    examples: int
    template: str
    tokens: int
    supervised: int
    lengths: dict[int, int]
    histogram: list[tuple[int, int]]
    cut: dict[int, float]
    long: int
    max_length: int
    long_rows: str
    repeated: int
    empty: int
    suggested_max_length: int


def in_marks(rows: Sequence[Shown]) -> str:
    """The rows as text in which marks tell what is learned, and a line that says which."""
    legend = "⟦ ⟧ is learned, ⟨cut: ⟩ is left out, the rest is read as context"
    return "\n".join([*(f"{row}".removesuffix("\n") + "\n" for row in rows), legend]) + "\n"


def in_colour(rows: Sequence[Shown]) -> "Text":
    """The rows as text in which colours tell what is learned, and a line that says which."""
    from rich.text import Text

    whole = Text()
    for row in rows:
        whole.append(f"{row.head}\n", "bold")
        for text, kind in row.pieces:
            text = _MARKS[kind].format(text.rstrip("\n")) if kind == "cut" else text
            whole.append(plain(text), _STYLES.get(kind))
        whole.rstrip()
        whole.append("\n\n")
    whole.append("magenta", _STYLES["learned"])
    return whole.append(" is learned, ⟨cut: ⟩ is left out, the rest is read as context")
