"""`mlx-adapters eval MODEL --task NAME`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mlx_adapters.cli import complete
from mlx_adapters.cli.options import AdapterFolder, Model, fields_as_options, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.errors import counted
from mlx_adapters.evaluate.config import EvalConfig
from mlx_adapters.screen import ended, say, table, track

if TYPE_CHECKING:
    from mlx_adapters.evaluate.run import Part

_KEYS = ("model", "adapter", "adapter_sha256", "template", "decoding", "settings", "reading", "data", "tasks")
_TASK = (
    "test sets, joined by commas: names (gsm8k, boolq, ...), groups (math, math-2023, commonsense, all), or "
    ".json and .jsonl files of your own"
)
_PROCESSES = (
    "share the items among processes, each with its own model [default: 1; on a CPU 2 for 128 items or "
    "more, where memory allows and a second core is free]"
)


@reporting(*_KEYS, "limit", "seed", "scores")
@fields_as_options(EvalConfig)
def command(
    model: Model,
    task: Annotated[str, opt(_TASK, values=complete.tasks)],
    adapter: AdapterFolder = None,
    processes: Annotated[int | None, opt(_PROCESSES, min=1)] = None,
    output: Annotated[Path | None, opt("JSON file with a record of every item")] = None,
    resume: Annotated[bool, opt("continue the interrupted records of --output")] = False,
    **given: Any,
) -> None:
    """Measure accuracy on the paper's test sets or your own."""
    from mlx_adapters.evaluate import score
    from mlx_adapters.evaluate.run import Evaluator
    from mlx_adapters.next_steps import after_eval

    config = EvalConfig(**{name: value for name, value in given.items() if value is not None})
    evaluator = Evaluator(
        model, task, config, adapter=adapter, output=output, resume=resume, processes=processes
    )
    if (count := evaluator.processes) > 1:
        say(f"{count} processes answer, each with its own model; --processes 1 takes less memory")
    with evaluator:
        for part in evaluator.parts:
            follow(part)
            say(f"{part.task.name}: {part.rate:.2f} items/s")
        found = evaluator.finish()
    reading = evaluator.asking.reading

    def words() -> None:
        table(*score.table(found.scores, found.settings["decoding"], reading))
        lines = filter(None, map(score.none_right, found.scores))
        ended("\n".join(lines), after_eval(model, task, adapter=adapter, output=output))

    report(found.settings | {"scores": found.scores}, words)


def follow(part: "Part", *, go_on: str = "go on with --resume") -> None:
    """Answer what is left of a test set with progress on screen; `go_on` is the advice after Ctrl-C."""
    from mlx_adapters.cpu import threads

    if words := threads.in_words():
        say(words)
    if part.resumed:
        say(f"{part.task.name}: {part.resumed} of {counted(len(part.items), 'item')} done already")
    try:
        for _ in track(part.task.name, part, part.left, lambda _: f"accuracy {part.accuracy:.1%}"):
            pass
    except KeyboardInterrupt:
        if part.file is not None:
            done = f"{len(part.done)} of {counted(len(part.items), 'item')} of {part.task.name}"
            say(f"saved: {done}, in {part.file.path}; {go_on}")
        raise
