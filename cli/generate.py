"""`mlx-adapters generate MODEL --prompt TEXT`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_adapters.cli import complete
from mlx_adapters.cli.options import json_object
from mlx_adapters.cli.report import live, report, reporting
from mlx_adapters.errors import ConfigError

__all__ = ["command"]


@reporting("text", "template", "prompt_tokens", "tokens", "finish_reason")
def command(
    model: Annotated[str, typer.Argument(help="model folder or hub id")],
    prompt: Annotated[str, typer.Option(help="the instruction")],
    adapter: Annotated[Path | None, typer.Option(help="adapter folder")] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="default: the adapter's (a fused one's too), else chat if there is one, else plain",
            autocompletion=complete.templates,
        ),
    ] = None,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(help="variables of the chat template: '{\"enable_thinking\": false}'")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token")] = 0.0,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
) -> None:
    """Answer one prompt, printed as it comes."""
    from mlx_adapters import adapter as adapters
    from mlx_adapters.adapter.call import before_text, start_cache, with_virtual
    from mlx_adapters.data.templates import chosen_template, conversation
    from mlx_adapters.data.tokens import prompt_ids
    from mlx_adapters.generate.sampling import sampler
    from mlx_adapters.generate.stream import stream
    from mlx_adapters.models import load as models
    from mlx_adapters.models.limits import check_length

    kwargs = json_object(chat_template_kwargs, "--chat-template-kwargs")
    loaded = models.load(model, answering=True)
    meta = adapters.load(loaded, adapter) if adapter else None
    loaded.model.eval()
    trained = meta.template if meta else None
    name = chosen_template(template, trained, loaded.template, tokenizer=loaded.tokenizer)
    turns = [{"role": "user", "content": prompt}]
    asked = conversation(turns, template=name, tokenizer=loaded.tokenizer, kwargs=kwargs)
    ids = prompt_ids(asked, loaded.tokenizer)
    if not ids:
        raise ConfigError("--prompt is empty: give the instruction to answer")
    row = with_virtual(loaded.model, ids, loaded.tokenizer)
    check_length(loaded.model, len(ids) + before_text(loaded.model), max_tokens)
    text, last = "", None
    for last in stream(
        loaded.model,
        loaded.tokenizer,
        row,
        prompt=ids,
        max_tokens=max_tokens,
        sampler=sampler(seed, temperature=temperature),
        cache=start_cache(loaded.model),
    ):
        text += last.text
        live(last.text)
    result = {
        "text": text,
        "template": name,
        "prompt_tokens": len(ids),
        "tokens": last.tokens if last else 0,
        "finish_reason": last.reason if last else None,
    }
    report(result, typer.echo)
