"""What a preview of training data is asked, and what it answers.

Imports nothing heavy: the command line makes its options of it.
"""

from dataclasses import dataclass

from mlx_adapters.fields import field

__all__ = ["Preview", "Shown", "Statistics"]


@dataclass(frozen=True, kw_only=True)
class Preview:
    """How rows would be trained; the defaults are those of training."""

    template: str | None = field(
        None, "alpaca, llm-adapters, chat, plain or a FILE.jinja [default: as training chooses]"
    )
    chat_template_kwargs: str | None = field(None, "as `train --chat-template-kwargs`")
    loss_on: str = field("completion", "as `train --loss-on`: completion, last or all")
    columns: str | None = field(None, "as `train --columns`: names of the rows' fields")
    cutoff: int = field(256, "longest row in tokens, as `train --cutoff`")
    rows: int = field(3, "how many rows are shown")


@dataclass(frozen=True)
class Shown:
    """A row as it is trained. `pieces` are (text, kind) in order; the kind is `context`, `learned` or `cut`
    (behind the cutoff). Special tokens stand in the text as they are. `tokens` counts all, and `supervised`
    those with a label within the cutoff."""

    row: int
    pieces: list[tuple[str, str]]
    tokens: int
    supervised: int


@dataclass(frozen=True)
class Statistics:
    """What `rows` become. Lengths are in tokens.

    Attributes:
        rows: in the source.
        examples: what is trained on; a chat may become several.
        template: the prompt template.
        tokens: of all examples, without a cutoff.
        supervised: those of them with a label.
        lengths: {percentile: length}; `100` is the longest.
        histogram: [(longest, examples up to it and above the one before)].
        cut: {cutoff: share of the examples that are longer}.
        repeated: rows that are the same as an earlier one.
        empty: rows with an empty answer.
        suggested_cutoff: keeps 99 % of the examples whole, within what the model can read.
    """

    rows: int
    examples: int
    template: str
    tokens: int
    supervised: int
    lengths: dict[int, int]
    histogram: list[tuple[int, int]]
    cut: dict[int, float]
    repeated: int
    empty: int
    suggested_cutoff: int
