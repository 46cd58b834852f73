"""`mlx-adapters generate MODEL PROMPT`."""

import time
from typing import Annotated, Any

import typer

from mlx_adapters.cli import options
from mlx_adapters.cli.options import arg, fields_as_options, opt
from mlx_adapters.cli.report import live, report, reporting
from mlx_adapters.errors import ConfigError, counted
from mlx_adapters.fields import merged, parse_fields
from mlx_adapters.generate.config import AnswerConfig
from mlx_adapters.screen import say

_KEYS = ("text", "template", "prompt_tokens", "tokens", "finish_reason")


@reporting(*_KEYS)
@fields_as_options(AnswerConfig)
def command(
    model: options.Model,
    prompt: Annotated[str | None, arg("the instruction")] = None,
    adapter: options.AdapterFolder = None,
    prompt_: Annotated[str | None, opt("the instruction, as an option", "--prompt")] = None,
    **given: Any,
) -> None:
    """Answer one prompt, printed as it comes."""
    from mlx_adapters.generate.text import stream

    if (prompt is None) == (prompt_ is None):
        raise ConfigError("generate: give one prompt, such as: mlx-adapters generate MODEL 'What is 2 + 3?'")
    config = parse_fields(AnswerConfig, merged({}, given), where="generate")
    answer = stream(model, prompt or prompt_ or "", adapter=adapter, **config.arguments())
    started = time.perf_counter()
    for piece in answer:
        live(piece)
    seconds = time.perf_counter() - started
    report({name: getattr(answer, name) for name in _KEYS}, typer.echo)
    say(f"{counted(answer.tokens, 'token')}, {answer.tokens / seconds:.1f} tokens/s, the prompt included")
