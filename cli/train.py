"""`mlx-adapters train MODEL --data SOURCE --output DIR`."""

import sys
from dataclasses import fields as fields_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_adapters import signals
from mlx_adapters.cli import options
from mlx_adapters.cli.complete import DTYPES, LOGGERS, methods
from mlx_adapters.cli.options import arg, fields_as_options, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import be_quiet, lines, say
from mlx_adapters.errors import ConfigError, counted
from mlx_adapters.fields import merged, parse_fields, settings
from mlx_adapters.files.documents import read_options
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.units import duration

if TYPE_CHECKING:
    from mlx_adapters.train.trainer import Trainer

_KEYS = ("method", "trainable", "parameters", "rows", "steps", "step", "seconds", "loss", "validation_loss")
_PROCESSES = "processes of this machine that share every batch: faster on a CPU"


@reporting("output", *_KEYS)
@fields_as_options(TrainConfig)
def command(
    model: Annotated[str | None, arg("model folder or hub id")] = None,
    data: Annotated[str | None, opt(".json or .jsonl file, folder, or hub id")] = None,
    output: Annotated[Path | None, opt("new folder for the adapter")] = None,
    method: Annotated[str | None, opt("see `mlx-adapters methods` [default: lora]", values=methods)] = None,
    set_: options.Settings = None,
    adapter: Annotated[Path | None, opt("continue from this adapter, ours or PEFT's, or a hub id")] = None,
    targets: Annotated[str | None, opt("short for --set targets=...")] = None,
    layers: Annotated[str | None, opt("short for --set layers=...")] = None,
    dropout: Annotated[float | None, opt("short for --set dropout=...")] = None,
    config: Annotated[Path | None, opt("YAML file of these options; flags win")] = None,
    exclude: Annotated[list[Path] | None, opt("leave out rows whose question is in this test file")] = None,
    resume: Annotated[bool, opt("continue from the newest checkpoint in --output")] = False,
    processes: Annotated[int, opt(_PROCESSES, min=1)] = 1,
    log: Annotated[list[str] | None, opt("also to tensorboard, wandb or trackio", values=LOGGERS)] = None,
    dtype: Annotated[str | None, opt("compute in float32, float16 or bfloat16", values=DTYPES)] = None,
    **given: Any,
) -> None:
    """Train an adapter on a frozen base model."""
    from mlx_adapters.cpu.processes import in_ring, run_ring

    named = {"model": model, "data": data, "output": output and str(output), "method": method}
    training = {field.name for field in fields_of(TrainConfig)}
    file = read_options(config, {*named, *training, "set"})
    chosen = merged({"method": "lora"}, {k: v for k, v in file.items() if k in named}, named)
    if missing := [name for name in ("model", "data", "output") if name not in chosen]:
        raise ConfigError(f"missing: {', '.join(missing)}. Give them on the command line or in --config")
    shorts = {"targets": targets, "layers": layers, "dropout": dropout}
    pairs = [f"{name}={value}" for name, value in shorts.items() if value is not None]
    fields = file.get("set") or {}
    if not isinstance(fields, dict):
        raise ConfigError(f"{config}: key 'set' must be a mapping of the method's fields")
    fields = merged(fields, settings([*(set_ or []), *pairs]))
    if adapter is not None and (fields or method is not None):
        raise ConfigError(f"--adapter {adapter} brings its method and fields: leave out --method and --set")
    values = merged({k: v for k, v in file.items() if k in training}, given)
    run_config = parse_fields(TrainConfig, values, where=f"train ({config})" if config else "train")
    if processes > 1:
        run_config = run_config.shared(processes)
        if not in_ring():
            raise typer.Exit(run_ring("mlx_adapters.cli.app", sys.argv[1:], processes, warn=say))
    given = {"start": adapter, "resume": resume, "log": log or [], **vars(run_config)}
    _train(chosen, fields, exclude or [], dtype, given)


def run(trainer: "Trainer", *, go_on: str = "Go on with --resume") -> float:
    """Train with progress on screen; Ctrl-C saves, says how to `go_on` and exits 130. Returns seconds."""
    from mlx_adapters.cpu import threads
    from mlx_adapters.train.interrupt import stop_on_interrupt

    words, told = "stopping after this step ...", threads.most()

    def stop() -> None:
        if not (signals.answered() or trainer.run.stopping):
            say(words)
        trainer.stop()

    with stop_on_interrupt(stop), signals.telling(words), lines("train", trainer.run.total) as update:
        for step in trainer:
            if threads.count() < told:
                told = threads.count()
                say(threads.in_words())
            update(step.step, step.in_words())
            for sentence in step.remarks():
                say(sentence)
            if step.stopped == "interrupted":
                say(f"interrupted at step {step.step}: saved in {trainer.output}. {go_on}")
                raise signals.Stopped
            if step.stopped:
                say(f"stopped at step {step.step}: {step.stopped}")
    result = trainer.result
    if trainer.processes.writes and result.step != result.steps:
        best = trainer.run.progress.best_loss
        say(f"the adapter is that of step {result.step}, validation loss {best:.4f}")
    return result.seconds


def _train(
    chosen: dict[str, Any],
    fields: dict[str, Any],
    exclude: list[Path],
    dtype: str | None,
    given: dict[str, Any],
) -> None:
    from mlx_adapters import methods
    from mlx_adapters.models import load as models
    from mlx_adapters.train.distributed import processes
    from mlx_adapters.train.examples import excluded_hashes, rows_of
    from mlx_adapters.train.summary import summary
    from mlx_adapters.train.trainer import Trainer, check_output

    output, together = Path(chosen["output"]), processes()
    method = methods.make(chosen["method"], fields)  # a typing error is told before the model loads
    if together.writes:
        check_output(output, given["resume"])
    else:
        be_quiet()  # the first process speaks for all
    rows, hashes = rows_of(chosen["data"], given["columns"]), excluded_hashes(exclude)
    say(f"{rows.origin}: {counted(len(rows.rows), 'row')} of the form {rows.format}")
    loaded = models.load(chosen["model"], dtype=dtype)
    trainer = Trainer(loaded, rows, method, output=output, exclude=hashes, processes=together, **given)
    for sentence in [*trainer.notes, *summary(trainer)]:
        say(sentence)
    if given["resume"]:
        say(f"resuming after step {trainer.run.step}")
    run(trainer)
    if not together.writes:
        return
    result = trainer.result

    def words() -> None:
        done = f"trained {counted(result.steps, 'step')} in {duration(result.seconds)}"
        if result.loss is not None:  # metrics.jsonl may have been taken away
            done += f", loss {result.loss:.4f} at step {result.step}"
        typer.echo(f"{output}: {done}. Next:")
        typer.echo(f"    mlx-adapters eval {chosen['model']} --adapter {output} --task SVAMP --data-dir DIR")
        typer.echo(f"    mlx-adapters export {output} DST --base OWNER/NAME")

    report({"output": output} | {key: getattr(result, key) for key in _KEYS}, words)
