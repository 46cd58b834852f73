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
from mlx_adapters.cli.screen import be_quiet, ended, lines, picture, say
from mlx_adapters.errors import ConfigError, counted
from mlx_adapters.fields import current, merged, parse_fields, settings, synonyms
from mlx_adapters.files.documents import read_options
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.units import duration

if TYPE_CHECKING:
    from mlx_adapters.train.trainer import Trainer

_KEYS = ("method", "trainable", "parameters", "rows", "steps", "step", "seconds", "loss")
_MEASURED = ("validation_loss", "validation_loss_before", "accuracy", "accuracy_before")
_PROCESSES = "processes of this machine that share every batch: faster on a CPU"


@reporting("output", *_KEYS, *_MEASURED)
@fields_as_options(TrainConfig)
def command(
    model: Annotated[str | None, arg("model folder or hub id")] = None,
    data: Annotated[list[str] | None, opt("file, folder, or hub id; may be repeated")] = None,
    output: Annotated[Path | None, opt("new folder for the adapter")] = None,
    method: Annotated[str | None, opt("see `mlx-adapters methods` [default: lora]", values=methods)] = None,
    set_: options.Settings = None,
    adapter: Annotated[Path | None, opt("continue from this adapter, ours or PEFT's")] = None,
    config: Annotated[Path | None, opt("YAML file of these options; flags win")] = None,
    exclude: Annotated[list[Path] | None, opt("leave out rows whose question is in this test file")] = None,
    resume: Annotated[bool, opt("continue from the newest checkpoint in --output")] = False,
    processes: Annotated[int, opt(_PROCESSES, min=1)] = 1,
    log: Annotated[list[str] | None, opt("also to tensorboard, wandb or trackio", values=LOGGERS)] = None,
    show_example: Annotated[bool, opt("print the first row as it is trained", "--show-example")] = False,
    dtype: Annotated[str | None, opt("compute in float32, float16 or bfloat16", values=DTYPES)] = None,
    **given: Any,
) -> None:
    """Train an adapter on a frozen base model."""
    from mlx_adapters.cpu.processes import in_ring, run_ring

    named = {"model": model, "data": data or None, "output": output and str(output), "method": method}
    known = {field.name for field in fields_of(TrainConfig)} | {*synonyms(TrainConfig), *named, "set"}
    file = current(TrainConfig, read_options(config, known))
    chosen = merged({"method": "lora"}, {k: v for k, v in file.items() if k in named}, named)
    if missing := [name for name in ("model", "data", "output") if name not in chosen]:
        raise ConfigError(f"missing: {', '.join(missing)}. Give them on the command line or in --config")
    fields = file.get("set") or {}
    if not isinstance(fields, dict):
        raise ConfigError(f"{config}: key 'set' must be a mapping of the method's fields")
    fields = merged(fields, settings(set_ or []))
    if adapter is not None and (fields or method is not None):
        raise ConfigError(f"--adapter {adapter} brings its method and fields: leave out --method and --set")
    values = merged({k: v for k, v in file.items() if k not in {*named, "set"}}, given)
    run_config = parse_fields(TrainConfig, values, where=f"train ({config})" if config else "train")
    if processes > 1:
        run_config = run_config.shared(processes)
        if not in_ring():
            raise typer.Exit(run_ring("mlx_adapters.cli.app", sys.argv[1:], processes, warn=say))
    given = {
        "show_example": show_example,
        "start": adapter,
        "resume": resume,
        "log": log or [],
        **vars(run_config),
    }
    _train(chosen, fields, exclude or [], dtype, given)


def run(trainer: "Trainer", *, go_on: str = "Go on with --resume") -> float:
    """Train with progress on screen; Ctrl-C saves, says how to `go_on` and exits 130. Returns seconds."""
    from mlx_adapters.cpu import threads
    from mlx_adapters.train.callbacks import Started
    from mlx_adapters.train.interrupt import stop_on_interrupt

    words, told = "stopping after this step ...", threads.most()

    def stop() -> None:
        if not (signals.answered() or trainer.run.stopping):
            say(words)
        trainer.stop()

    trainer.callbacks.append(Started(say))
    with stop_on_interrupt(stop), signals.telling(words), lines("train", trainer.run.total) as update:
        trainer.watch.tell = lambda doing: update(trainer.run.step, doing)
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
    for sentence in result.remarks() if trainer.processes.writes else ():
        say(sentence)
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
    from mlx_adapters.next_steps import after_train
    from mlx_adapters.train.callbacks import Tokenizing
    from mlx_adapters.train.distributed import processes
    from mlx_adapters.train.examples import excluded_hashes, rows_of
    from mlx_adapters.train.summary import first_row, summary
    from mlx_adapters.train.trainer import Trainer, check_output

    show_example = given.pop("show_example")
    output, together = Path(chosen["output"]), processes()
    method = methods.make(chosen["method"], fields)  # a typing error is told before the model loads
    if together.writes:
        check_output(output, given["resume"])
    else:
        be_quiet()  # the first process speaks for all
    rows, hashes = rows_of(chosen["data"], given["columns"]), excluded_hashes(exclude)
    say(f"{rows.origin}: {counted(len(rows.rows), 'row')} of the form {rows.format}")
    loaded = models.load(chosen["model"], dtype=dtype)
    given |= {"output": output, "exclude": hashes, "processes": together, "callbacks": [Tokenizing(say)]}
    trainer = Trainer(loaded, rows, method, **given)
    for sentence in [*trainer.notes, *summary(trainer)]:
        say(sentence)
    if show_example:
        picture(first_row(trainer), err=True)
    if given["resume"]:
        say(f"resuming after step {trainer.run.step}")
    run(trainer)
    if not together.writes:
        return
    result = trainer.result

    def words() -> None:
        done = f"{output}: trained {counted(result.steps, 'step')} in {duration(result.seconds)}"
        if result.loss is not None:  # metrics.jsonl may have been taken away
            done += f", loss {result.loss:.4f} at step {result.step}"
        ended(done, after_train(chosen["model"], chosen["data"], rows, output, trainer.meta))

    report({"output": output} | {key: getattr(result, key) for key in _KEYS + _MEASURED}, words)
