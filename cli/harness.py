"""`mlx-adapters harness MODEL --tasks NAME,...`."""

from pathlib import Path
from typing import Annotated

from mlx_adapters.cli.options import AdapterFolder, BatchSize, ChatTemplateKwargs, Model, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.screen import say, table

_FEWSHOT = "worked examples in the prompt [default: the task's]"
_CHAT = "write prompts as the model's chat template does"


@reporting("model", "adapter", "results", "versions", "samples")
def command(
    model: Model,
    tasks: Annotated[str, opt("tasks or groups of lm_eval, joined by commas: arc_easy,piqa")],
    adapter: AdapterFolder = None,
    num_fewshot: Annotated[int | None, opt(_FEWSHOT, min=0)] = None,
    limit: Annotated[int | None, opt("the first N items of each task", min=1)] = None,
    batch_size: BatchSize = None,
    chat_template: Annotated[bool, opt(_CHAT, "--apply-chat-template")] = False,
    chat_template_kwargs: ChatTemplateKwargs = None,
    include_path: Annotated[
        Path | None, opt("folder of your own YAML tasks; Python they name is run")
    ] = None,
    output: Annotated[Path | None, opt("JSON file with the results and every sample")] = None,
) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness on a model and adapter (extra `lm-eval`)."""
    from mlx_adapters.evaluate.harness import columns, rows, run_tasks
    from mlx_adapters.files.writing import write_json

    found = run_tasks(
        model,
        [name.strip() for name in tasks.split(",") if name.strip()],
        adapter=adapter,
        batch_size=batch_size,
        num_fewshot=num_fewshot,
        limit=limit,
        chat_template=chat_template,
        chat_template_kwargs=chat_template_kwargs,
        include_path=include_path,
    )
    about = {"model": model, "adapter": str(adapter) if adapter else None}
    if output is not None:
        write_json(output, found | about)
        say(f"results and samples: {output}")
    shown = about | {name: found[name] for name in ("results", "versions")} | {"samples": found["n-samples"]}
    report(shown, lambda: table(columns(), rows(found)))
