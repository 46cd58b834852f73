"""`mlx-adapters generate MODEL --prompt TEXT`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_adapters.cli import complete
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
            help="default: the adapter's, else chat if there is one", autocompletion=complete.templates
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token")] = 0.0,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
) -> None:
    """Answer one prompt, printed as it comes."""
    import mlx.core as mx
    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_sampler

    from mlx_adapters import adapter as adapters
    from mlx_adapters import model as models
    from mlx_adapters.data.templates import prompt_for
    from mlx_adapters.data.tokens import prompt_ids
    from mlx_adapters.models.limits import check_length
    from mlx_adapters.virtual import before_text, start_cache, with_virtual

    loaded = models.load(model, answering=True)
    meta = adapters.load(loaded, adapter) if adapter else None
    loaded.model.eval()
    fallback = "chat" if loaded.tokenizer.has_chat_template else "plain"
    name = template or (meta.template if meta else "") or fallback
    text = prompt_for(prompt, template=name, tokenizer=loaded.tokenizer, phase="eval")
    ids = prompt_ids(text, loaded.tokenizer)
    if not ids:
        raise ConfigError("--prompt is empty: give the instruction to answer")
    row = with_virtual(loaded.model, ids, loaded.tokenizer)
    check_length(loaded.model, len(ids) + before_text(loaded.model), max_tokens)
    mx.random.seed(seed)
    text, last = "", None
    for last in stream_generate(
        loaded.model,
        loaded.tokenizer,
        row,
        max_tokens=max_tokens,
        sampler=make_sampler(temp=temperature),
        prompt_cache=start_cache(loaded.model),
    ):
        text += last.text
        live(last.text)
    result = {
        "text": text,
        "template": name,
        "prompt_tokens": len(ids),
        "tokens": last.generation_tokens if last else 0,
        "finish_reason": last.finish_reason if last else None,
    }
    report(result, typer.echo)
