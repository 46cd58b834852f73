"""`mlx-adapters quickstart`: the whole job once, on data and a model that need no network."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from mlx_adapters.cli.options import opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.study import work
from mlx_adapters.screen import ended, say, table
from mlx_adapters.units import duration

_MODEL = ("folder", "parameters", "bits_per_weight", "bytes")


@reporting(*_MODEL, "trainable", "base", "adapted", "gain", "seconds", "verify")
def command(
    dir: Annotated[Path, opt("new folder for everything that is written")] = Path("quickstart"),
    model: Annotated[str | None, opt("hub id or folder instead of the embedded model")] = None,
    steps: Annotated[int, opt("training steps of 8 rows", min=1)] = 55,
    seed: Annotated[int, opt("seed of data, initialisation and order")] = 0,
) -> None:
    """The whole job once: convert, measure, train, measure, export."""
    from mlx_adapters.next_steps import after_quickstart
    from mlx_adapters.study.quickstart import Quickstart

    job = Quickstart(dir, model=model, steps=steps, seed=seed, say=say)
    for phase in job.phases():
        work(phase, go_on=f"Remove {dir} to start again")
    say("")
    verdict = job.verdict

    def words() -> None:
        table(*job.cells())
        verified = "Not verified in PyTorch, which is not installed."
        if verdict:
            verified = f"Verified in PyTorch: {'passed' if verdict.passed else 'FAILED'}."
        text = f"Gain: {job.gain:+.1f} points in {duration(job.seconds)}, {job.size}. {verified}\n"
        ended(text, after_quickstart(dir))

    found = {name: dir if name == "folder" else getattr(job.converted, name) for name in _MODEL}
    found |= {"trainable": job.trainable, "base": job.base, "adapted": job.adapted, "gain": job.gain}
    checked = verdict and asdict(verdict) | {"passed": verdict.passed}
    report(found | {"seconds": job.seconds, "verify": checked}, words)
