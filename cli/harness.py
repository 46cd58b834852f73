"""`mlx-adapters harness MODEL --tasks NAME,...`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import say, table
from mlx_adapters.errors import ConfigError

__all__ = ["command"]


@reporting("model", "adapter", "results", "versions", "samples")
def command(
    model: Annotated[str, typer.Argument(help="model folder or hub id")],
    tasks: Annotated[str, typer.Option(help="tasks or groups of lm_eval, joined by commas: arc_easy,piqa")],
    adapter: Annotated[
        Path | None, typer.Option(help="adapter folder; without it the base is measured")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="worked examples in the prompt [default: the task's]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="the first N items of each task")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="rows computed together [default: what memory allows, up to 64]")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="write prompts as the model's chat template does")
    ] = False,
    include_path: Annotated[
        Path | None, typer.Option(help="folder of your own YAML tasks; Python they name is run")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file with the results and every sample")] = None,
) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness on a model and adapter (extra `lm-eval`)."""
    from mlx_adapters.evaluate.harness import run_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks is empty: name tasks of lm_eval, as in --tasks arc_easy,piqa")
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include-path {include_path}: no such folder")
    from mlx_adapters import adapter as adapters
    from mlx_adapters.models import load as models

    loaded = models.load(model, answering=True)
    if adapter is not None:
        adapters.load(loaded, adapter)
    loaded.model.eval()
    found = run_tasks(
        loaded,
        names,
        batch_size=batch_size,
        num_fewshot=num_fewshot,
        limit=limit,
        chat_template=chat_template,
        include_path=include_path,
    )
    about = {"model": model, "adapter": str(adapter) if adapter else None}
    if output is not None:
        from mlx_adapters.study.cells import write_json

        write_json(output, found | about)
        say(f"results and samples: {output}")
    shown = about | {
        "results": found["results"],
        "versions": found["versions"],
        "samples": found["n-samples"],
    }
    report(
        shown, lambda: table(["task", "metric", "filter", "value", "standard error", "items"], _rows(found))
    )


def _rows(found: dict[str, Any]) -> list[list[str]]:
    """One row a metric: lm_eval names it `metric,filter` and its standard error `metric_stderr,filter`."""
    rows = []
    for task, metrics in found["results"].items():
        items = str(found["n-samples"].get(task, {}).get("effective", ""))
        for key, value in metrics.items():
            metric, comma, rule = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = metrics.get(f"{metric}_stderr,{rule}")
                shown = f"{error:.4f}" if isinstance(error, int | float) else ""
                rows.append([task, metric, rule, f"{value:.4f}", shown, items])
    return rows
