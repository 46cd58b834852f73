"""`mlx-adapters combine ADAPTER ADAPTER ... DST`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_adapters.cli.complete import COMBINATIONS
from mlx_adapters.cli.options import arg, numbers, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.errors import counted

_WEIGHTS = "a number for each adapter, joined by commas [default: equal shares]"
_HOW = "linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune (also *_svd)"


@reporting("path", "how", "weights", "layers", "rank")
def command(
    adapters: Annotated[list[Path], arg("LoRA adapters of one base: folders or hub ids")],
    dst: Annotated[Path, arg("new adapter folder to write")],
    weights: Annotated[str | None, opt(_WEIGHTS)] = None,
    how: Annotated[str, opt(_HOW, values=COMBINATIONS)] = "linear",
    rank: Annotated[int | None, opt("rank of the result, for svd")] = None,
    density: Annotated[float, opt("share of entries that ties, dare and prune keep")] = 0.5,
    seed: Annotated[int, opt("seed for choosing the entries that dare drops")] = 0,
) -> None:
    """Merge LoRA adapters, weighted, into one.

    It computes what PEFT's add_weighted_adapter does.
    """
    shares = [1 / len(adapters)] * len(adapters)
    if weights is not None:
        shares = numbers(weights, float, "--weights", "numbers joined by commas, like 0.7,0.3")
    from mlx_adapters.adapter.combine import combine

    done = combine(adapters, shares, dst, method=how, rank=rank, density=density, seed=seed)
    of = f"{how} of {counted(len(adapters), 'adapter')}, {counted(done.layers, 'layer')}, rank {done.rank}"
    found = {"path": done.path, "how": how, "weights": shares, "layers": done.layers, "rank": done.rank}
    report(found, lambda: typer.echo(f"{done.path}: {of}"))
