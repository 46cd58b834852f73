"""`mlx-adapters generate MODEL --prompt TEXT`."""

from typing import Annotated

import typer

from mlx_adapters.cli.options import AdapterFolder, ChatTemplateKwargs, Model, Template, json_object
from mlx_adapters.cli.report import live, report, reporting

__all__ = ["command"]


@reporting("text", "template", "prompt_tokens", "tokens", "finish_reason")
def command(
    model: Model,
    prompt: Annotated[str, typer.Option(help="the instruction")],
    adapter: AdapterFolder = None,
    template: Template = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token")] = 0.0,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
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
        chat_template_kwargs=json_object(chat_template_kwargs, "--chat-template-kwargs"),
    )
    for piece in answer:
        live(piece)
    fields = ("text", "template", "prompt_tokens", "tokens", "finish_reason")
    report({name: getattr(answer, name) for name in fields}, typer.echo)
