"""`mlx-adapters generate MODEL --prompt TEXT`."""

from typing import Annotated

import typer

from mlx_adapters.cli import options
from mlx_adapters.cli.options import opt
from mlx_adapters.cli.report import live, report, reporting

_KEYS = ("text", "template", "prompt_tokens", "tokens", "finish_reason")


@reporting(*_KEYS)
def command(
    model: options.Model,
    prompt: Annotated[str, opt("the instruction")],
    adapter: options.AdapterFolder = None,
    template: options.Template = None,
    chat_template_kwargs: options.ChatTemplateKwargs = None,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.0,
    seed: Annotated[int, opt("seed of the sampling")] = 0,
) -> None:
    """Answer one prompt, printed as it comes."""
    from mlx_adapters.generate.text import stream

    answer = stream(
        model,
        prompt,
        adapter=adapter,
        template=template,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        chat_template_kwargs=chat_template_kwargs,
    )
    for piece in answer:
        live(piece)
    report({name: getattr(answer, name) for name in _KEYS}, typer.echo)
