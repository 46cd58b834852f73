"""The settings of an evaluation, declared once: options of `eval`, fields of its report.

Imports nothing heavy: the command line reads the declarations before it knows whether MLX is needed.
"""

from dataclasses import dataclass
from typing import Any

from mlx_adapters.errors import ConfigError, unknown
from mlx_adapters.evaluate.protocol import chosen
from mlx_adapters.fields import field
from mlx_adapters.files.documents import json_option

__all__ = ["CHOICES", "DECODINGS", "EvalConfig"]

DECODINGS = ("greedy", "beam", "sample", "likelihood")
CHOICES = ("label", "text")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How test sets are asked and answers are read. None stands for what the help text says."""

    data_dir: str | None = field(None, "folder with NAME/test.json; default: the hub")
    limit: int | None = field(None, "use N items of each set, drawn by the seed")
    batch_size: int | None = field(None, "rows decoded together [default: what memory allows, up to 64]")
    max_tokens: int | None = field(None, "longest answer [default: the paper's, 256 or 32]")
    protocol: str | None = field(
        None, "paper: four beams, the template llm-adapters, the paper's longest answers, and its reading"
    )
    decoding: str | None = field(
        None,
        "greedy; beam (4 beams, the paper's numbers); sample; likelihood of the choices [default: greedy]",
    )
    num_beams: int | None = field(None, "number of beams of --decoding beam [default: 4]")
    temperature: float = field(0.1, "temperature of --decoding sample")
    top_p: float = field(0.75, "--decoding sample: draw from the fewest tokens with this probability")
    top_k: int = field(40, "--decoding sample: draw from the K likeliest tokens")
    choices: str = field(
        "label", "what --decoding likelihood scores: label (the paper's answer) or text (lm-eval's cloze)"
    )
    template: str | None = field(
        None, "prompt template, or a FILE.jinja [default: the adapter's, else alpaca]"
    )
    chat_template_kwargs: str | None = field(
        None, "chat template variables, as JSON [default: the adapter's]"
    )
    force_template: bool = field(False, "allow another template than the adapter's")
    prompt: str | None = field(
        None, "question of your own file, made from its fields: '{text} Options: {options}'"
    )
    label: str = field("answer", "field of your own file that holds the right answer")
    seed: int = field(0, "seed for drawing the items of --limit, and for sampling")

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_tokens", "num_beams"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        json_option(self.chat_template_kwargs, "--chat-template-kwargs")
        if self.choices not in CHOICES:
            raise ConfigError(unknown("value of --choices", self.choices, CHOICES))

    def settled(self) -> dict[str, Any]:
        """Decoding, beams, template, longest answer and reading, from the protocol or the defaults."""
        names = ("decoding", "num_beams", "template", "max_tokens")
        found = chosen(self.protocol, {name: getattr(self, name) for name in names}, flag="--")
        if found["decoding"] not in DECODINGS:
            raise ConfigError(unknown("decoding", found["decoding"], DECODINGS))
        return found
