"""`mlx-adapters train MODEL --data SOURCE --output DIR`."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_adapters.cli import complete
from mlx_adapters.cli.options import fields_as_options, merged, read_yaml, settings
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import be_quiet, lines, say
from mlx_adapters.cli.signals import answered, telling
from mlx_adapters.errors import ConfigError, counted
from mlx_adapters.files.lock import locked
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.units import duration, size

if TYPE_CHECKING:
    from mlx_adapters.train.loop import Run, Step
    from mlx_adapters.train.session import Session

__all__ = ["command", "run"]


_KEYS = ("output", "method", "trainable", "parameters", "rows", "steps", "step", "seconds", "loss")


@reporting(*_KEYS, "validation_loss")
@fields_as_options(TrainConfig)
def command(
    model: Annotated[str | None, typer.Argument(help="model folder or hub id")] = None,
    data: Annotated[str | None, typer.Option(help=".json or .jsonl file, folder, or hub id")] = None,
    output: Annotated[Path | None, typer.Option(help="new folder for the adapter")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="see `mlx-adapters methods` [default: lora]", autocompletion=complete.methods),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="a field of the method: rank=16")] = None,
    adapter: Annotated[Path | None, typer.Option(help="go on from this adapter, of ours or PEFT's")] = None,
    targets: Annotated[str | None, typer.Option(help="short for --set targets=...")] = None,
    layers: Annotated[str | None, typer.Option(help="short for --set layers=...")] = None,
    dropout: Annotated[float | None, typer.Option(help="short for --set dropout=...")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of these options; flags win")] = None,
    exclude: Annotated[
        list[Path] | None, typer.Option(help="leave out rows that stand in this test file")
    ] = None,
    resume: Annotated[bool, typer.Option(help="go on from the newest checkpoint in --output")] = False,
    processes: Annotated[
        int, typer.Option(min=1, help="processes of this machine that share every batch: faster on a CPU")
    ] = 1,
    log: Annotated[
        list[str] | None,
        typer.Option(
            help="also to tensorboard, wandb or trackio", autocompletion=complete.among(complete.LOGGERS)
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="compute in float32, float16 or bfloat16", autocompletion=complete.among(complete.DTYPES)
        ),
    ] = None,
    **given: Any,
) -> None:
    """Train an adapter on a frozen base model."""
    import dataclasses

    from mlx_adapters.cpu.processes import in_ring, run_ring

    named = {"model": model, "data": data, "output": output and str(output), "method": method}
    training = {field.name for field in dataclasses.fields(TrainConfig)}
    file = read_yaml(config, {*named, *training, "set"})
    chosen = merged({"method": "lora"}, {k: v for k, v in file.items() if k in named}, named)
    if missing := [name for name in ("model", "data", "output") if name not in chosen]:
        raise ConfigError(f"missing: {', '.join(missing)}. Give them on the command line or in --config")
    shorts = {"targets": targets, "layers": layers, "dropout": dropout}
    pairs = [f"{name}={value}" for name, value in shorts.items() if value is not None]
    fields = merged(_method_fields(file, config), settings([*(set_ or []), *pairs]))
    if adapter is not None and (fields or method is not None):
        raise ConfigError(f"--adapter {adapter} brings its method and fields: leave out --method and --set")
    run_config = _train_config(merged({k: v for k, v in file.items() if k in training}, given), config)
    if processes > 1:
        run_config = _shared(run_config, processes)
        if not in_ring():
            app = "mlx_adapters.cli.app"
            raise typer.Exit(run_ring(app, sys.argv[1:], processes, warn=say, on_signal=answered))
    _train(
        chosen, fields, run_config, exclude or [], start=adapter, resume=resume, dtype=dtype, log=log or []
    )


def run(session: "Session", *, go_on: str = "Go on with --resume") -> float:
    """Train a prepared session with progress on screen; Ctrl-C saves, says how to `go_on` and exits 130.

    Returns seconds.
    """
    from mlx_adapters.cpu import threads

    started, told = time.perf_counter(), threads.most()
    with _interruptible(session.run.stop), lines("train", session.run.total) as display:
        for step in session:
            if threads.count() < told:
                told = threads.count()
                say(threads.in_words())
            display.update(step.step, _text(step))
            if step.validation_loss is not None:
                say(f"step {step.step}: validation loss {step.validation_loss:.4f}")
            if step.skipped:
                say(f"step {step.step}: skipped, its loss is {step.loss:.4f}")
            if step.stopped == "interrupted":
                session.save()
                say(f"interrupted at step {step.step}: saved in {session.output}. {go_on}")
                raise typer.Exit(130)
            if step.stopped:
                say(f"stopped at step {step.step}: {step.stopped}")
    taken = session.finish()
    if taken != session.run.step:
        say(f"the adapter is that of step {taken}, validation loss {session.run.progress.best_loss:.4f}")
    return time.perf_counter() - started


def describe(session: "Session") -> None:
    """Say what will be trained, before it is."""
    from mlx_adapters.models.limits import made_for

    names = sorted({path.rpartition(".")[2] for path in session.paths})
    share = session.trainable / session.parameters
    say(f"{session.meta.method} on {counted(len(session.paths), 'layer')} ({', '.join(names)})")
    say(f"trainable {session.trainable:,} of {session.parameters:,} parameters ({share:.3%})")
    rows, held = counted(len(session.run.examples), "row"), len(session.run.validation)
    counts = f"{rows} to train on, {held} held out"
    counts += f", template {session.meta.template}, loss on {session.meta.loss_on}"
    if session.excluded:
        counts += f"; {session.excluded} left out because they stand in the excluded files"
    if session.encoded.truncated:
        counts += f"; {session.encoded.truncated} cut at {session.run.config.cutoff} tokens"
    encoded = session.encoded
    if encoded.dropped:
        counts += f"; {encoded.dropped} dropped: nothing to learn within the cutoff"
    if encoded.empty:
        counts += f"; {encoded.empty} with an empty answer"
    if encoded.repeated:
        counts += f"; {encoded.repeated} the same as an earlier row"
    say(counts)
    if encoded.endless:
        say("the tokenizer has no end token: answers will not learn where to end")
    long = made_for(session.loaded.config)
    if long and (over := sum(len(example.ids) > long for example in session.run.examples)):
        say(f"{over} rows are longer than the {long} tokens that the model was made for")
    _say_length(session.run)


def _say_length(run: "Run") -> None:
    """What a user who chose no number of steps, or too many of warm-up, would not expect."""
    from mlx_adapters.train.length import EPOCHS, epochs

    config = run.config
    if config.steps is None and config.epochs is None:
        passes = epochs(run.examples, config, run.processes.size)
        if passes > EPOCHS:
            say(f"few rows: {passes} epochs instead of {EPOCHS} make {run.total} steps. --epochs chooses")
    if run.warmup == run.total:
        say(f"all {run.total} steps are warm-up, so the rate stays below {config.lr:g}. Lower --warmup")


def _train(
    chosen: dict[str, Any],
    fields: dict[str, Any],
    config: TrainConfig,
    exclude: list[Path],
    *,
    start: Path | None,
    resume: bool,
    dtype: str | None,
    log: list[str],
) -> None:
    from mlx_adapters import methods
    from mlx_adapters.data.sources import load_rows
    from mlx_adapters.models import load as model
    from mlx_adapters.train import session as sessions
    from mlx_adapters.train.distributed import processes

    methods.make_config(chosen["method"], fields)  # a typing error is told before the model loads
    output = Path(chosen["output"])
    together = processes()
    if together.writes:
        sessions.check_output(output, resume)
    else:
        be_quiet()  # the first process speaks for all
    rows = load_rows(chosen["data"])
    hashes = sessions.excluded_hashes(exclude)
    say(f"{rows.origin}: {counted(len(rows.rows), 'row')} of the form {rows.format}")
    loaded = model.load(chosen["model"], dtype=dtype)
    with ExitStack() as alone:
        if resume and together.writes:  # or it would go on from what another run is writing
            alone.enter_context(locked(output))
        session = sessions.prepare(
            loaded,
            rows,
            method=chosen["method"],
            fields=fields,
            config=config,
            output=output,
            exclude=hashes,
            start=start,
            resume=resume,
            log=log,
            processes=together,
            warn=say,
        )
        if not resume and together.writes:
            alone.enter_context(locked(output))
        describe(session)
        if resume:
            say(f"resuming after step {session.run.step}")
        seconds = run(session)
    if not together.writes:
        return
    result = _result(session, seconds)

    def words() -> None:
        done = f"trained {counted(result['steps'], 'step')} in {duration(seconds)}"
        if result["loss"] is not None:  # metrics.jsonl may have been taken away
            done += f", loss {result['loss']:.4f} at step {result['step']}"
        typer.echo(f"{output}: {done}. Next:")
        typer.echo(f"    mlx-adapters eval {chosen['model']} --adapter {output} --task SVAMP --data-dir DIR")
        typer.echo(f"    mlx-adapters export {output} DST --base OWNER/NAME")

    report(result, words)


def _result(session: "Session", seconds: float) -> dict[str, Any]:
    """The run in numbers; `loss` and `validation_loss` are those of the step whose adapter is kept."""
    from mlx_adapters import adapter
    from mlx_adapters.train import metrics
    from mlx_adapters.train.session import METRICS

    step = adapter.read_meta(session.output).training["steps_done"]
    row = next((row for row in metrics.read(session.output / METRICS) if row["step"] == step), {})
    return {
        "output": session.output,
        "method": session.meta.method,
        "trainable": session.trainable,
        "parameters": session.parameters,
        "rows": len(session.run.examples),
        "steps": session.run.step,
        "step": step,
        "seconds": seconds,
        "loss": row.get("loss"),
        "validation_loss": row.get("validation_loss"),
    }


def _shared(config: TrainConfig, processes: int) -> TrainConfig:
    """The settings of one of the processes: its part of every batch."""
    import dataclasses

    if config.batch_size % processes:
        raise ConfigError(f"batch_size={config.batch_size} must be a multiple of processes={processes}")
    return dataclasses.replace(config, batch_size=config.batch_size // processes)


def _text(step: "Step") -> str:
    return (
        f"loss {step.loss:.4f}  lr {step.lr:.2g}  {step.tokens_per_second:.0f} tokens/s  "
        f"memory {size(step.memory)}"
    )


def _method_fields(file: dict[str, Any], path: Path | None) -> dict[str, Any]:
    fields = file.get("set") or {}
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: key 'set' must be a mapping of the method's fields")
    return fields


def _train_config(values: dict[str, Any], file: Path | None) -> TrainConfig:
    from mlx_adapters.fields import parse_fields

    config: TrainConfig = parse_fields(TrainConfig, values, where=f"train ({file})" if file else "train")
    return config


@contextmanager
def _interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C ends the run after the current step, when model and optimizer agree; a second ends it now."""
    pressed: list[int] = []
    words = "stopping after this step ..."

    def note(number: int, frame: Any) -> None:
        told = answered()
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        stop()
        if not told:
            say(words)

    before = signal.signal(signal.SIGINT, note)
    try:
        with telling(words):
            yield
    finally:
        signal.signal(signal.SIGINT, before)
