"""`mlx-adapters train MODEL --data SOURCE --output DIR`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_adapters import signals
from mlx_adapters.cli import options
from mlx_adapters.cli.complete import DTYPES, LOGGERS, methods
from mlx_adapters.cli.options import arg, fields_as_options, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.errors import counted
from mlx_adapters.screen import be_quiet, ended, lines, picture, say
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.units import duration

if TYPE_CHECKING:
    from mlx_adapters.train.run_file import Written
    from mlx_adapters.train.trainer import Trainer

_KEYS = ("method", "trainable", "parameters", "rows", "steps", "step", "seconds", "loss")
_MEASURED = ("validation_loss", "validation_loss_before", "accuracy", "accuracy_before")
_PROCESSES = "processes of this machine that share every batch: faster on a CPU [default: 1]"


@reporting("output", *_KEYS, *_MEASURED)
@fields_as_options(TrainConfig)
def command(
    model: Annotated[str | None, arg("model folder or hub id")] = None,
    data: Annotated[list[str] | None, opt("file, folder, or hub id; may be repeated")] = None,
    output: Annotated[Path | None, opt("new folder for the adapter")] = None,
    method: Annotated[str | None, opt("see `mlx-adapters methods` [default: lora]", values=methods)] = None,
    set_: options.Settings = None,
    adapter: Annotated[Path | None, opt("continue from this adapter, ours or PEFT's, or a hub id")] = None,
    config: Annotated[Path | None, opt("YAML file of these options; flags win")] = None,
    exclude: Annotated[list[Path] | None, opt("leave out rows whose question is in this test file")] = None,
    resume: Annotated[bool, opt("continue from the newest checkpoint in --output")] = False,
    processes: Annotated[int | None, opt(_PROCESSES, min=1)] = None,
    log: Annotated[list[str] | None, opt("also to tensorboard, wandb or trackio", values=LOGGERS)] = None,
    show_example: Annotated[bool, opt("print the first row as it is trained", "--show-example")] = False,
    dtype: Annotated[str | None, opt("compute in float32, float16 or bfloat16", values=DTYPES)] = None,
    **given: Any,
) -> None:
    """Train an adapter on a frozen base model."""
    from mlx_adapters.cpu.processes import in_ring, run_ring
    from mlx_adapters.train.run_file import read_run

    given |= {"model": model, "data": data, "output": output, "method": method, "adapter": adapter}
    given |= {"exclude": exclude, "processes": processes, "log": log, "dtype": dtype}
    run = read_run(config, given, set_ or [], resume=resume)
    if run.what.processes > 1:
        run = run.shared()
        if not in_ring():
            raise typer.Exit(run_ring("mlx_adapters.cli.app", sys.argv[1:], run.what.processes, warn=say))
    _train(run, resume=resume, show_example=show_example)


def follow(trainer: "Trainer", *, go_on: str = "Go on with --resume") -> float:
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
        trainer.watch.tell = lambda doing: update(max(0, trainer.run.step - 1), doing)
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


def _train(run: "Written", *, resume: bool, show_example: bool) -> None:
    from mlx_adapters import methods
    from mlx_adapters.models import load as models
    from mlx_adapters.next_steps import after_train
    from mlx_adapters.train.callbacks import Tokenizing
    from mlx_adapters.train.distributed import processes
    from mlx_adapters.train.examples import excluded_hashes, rows_of
    from mlx_adapters.train.run_file import remember, several
    from mlx_adapters.train.summary import first_row, summary
    from mlx_adapters.train.trainer import Trainer, check_output

    output, together, what = run.output, processes(), run.what
    method = methods.make(what.method, run.fields)  # a typing error is told before the model loads
    if together.writes:
        check_output(output, resume)
    else:
        be_quiet()  # the first process speaks for all
    streamed, hashes = run.config.streamed(together.size), excluded_hashes(several(what.exclude))
    rows = rows_of(what.data, run.config.columns, streamed)
    say(f"{rows.origin}: {counted(len(rows.rows), 'row')} of the form {rows.format}")
    loaded = models.load(what.model, dtype=what.dtype)
    more: dict[str, Any] = {"start": what.adapter, "exclude": hashes, "log": several(what.log)}
    more |= {"output": output, "resume": resume, "processes": together, "callbacks": [Tokenizing(say)]}
    trainer = Trainer(loaded, rows, method, **more, **vars(run.config))
    if together.writes:
        remember(run)
    for sentence in [*trainer.notes, *summary(trainer)]:
        say(sentence)
    if show_example:
        picture(first_row(trainer), err=True)
    if resume:
        say(f"resuming after step {trainer.run.step}")
    follow(trainer)
    if not together.writes:
        return
    result = trainer.result

    def words() -> None:
        done = f"{output}: trained {counted(result.steps, 'step')} in {duration(result.seconds)}"
        if result.loss is not None:  # metrics.jsonl may have been taken away
            done += f", loss {result.loss:.4f} at step {result.step}"
        ended(done, after_train(what.model, what.data, rows, output, trainer.meta))

    report({"output": output} | {key: getattr(result, key) for key in _KEYS + _MEASURED}, words)
