"""`mlx-adapters fuse MODEL DST --adapter DIR`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mlx_adapters.cli import complete
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import say
from mlx_adapters.errors import counted
from mlx_adapters.units import size

__all__ = ["command"]


_KEYS = ("path", "bytes", "dtype", "layers", "effect", "error", "error_rms", "torch_diff", "bound", "passed")


@reporting(*_KEYS)
def command(
    model: Annotated[str, typer.Argument(help="model folder or hub id the adapter was trained on")],
    dst: Annotated[Path, typer.Argument(help="new folder to write")],
    adapter: Annotated[Path, typer.Option(help="adapter folder")],
    to: Annotated[
        str,
        typer.Option(
            help="transformers: a Hugging Face checkpoint; mlx: an MLX folder",
            autocompletion=complete.among(complete.TARGETS),
        ),
    ] = "transformers",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16 [default: the base's]",
            autocompletion=complete.among(complete.DTYPES),
        ),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="with --to mlx: quantize the fused weights anew")] = None,
    group_size: Annotated[int | None, typer.Option(help="weights that share a scale")] = None,
    mode: Annotated[
        str,
        typer.Option(help="affine, mxfp4, mxfp8 or nvfp4", autocompletion=complete.among(complete.MODES)),
    ] = "affine",
    verify: Annotated[bool, typer.Option(help="open the checkpoint with transformers and compare")] = False,
) -> None:
    """Merge an adapter into its base, for use without any library."""
    from mlx_adapters.convert.fuse import fuse

    done = fuse(
        model, adapter, dst, to=to, dtype=dtype, bits=bits, group_size=group_size, mode=mode, verify=verify
    )
    if done.error > 0.1 * done.effect:
        say("warning: rounding the fused weights undoes part of what the adapter learned; use more bits")
    compared = done.torch_diff is not None

    def words() -> None:
        typer.echo(f"{done.path}: {counted(done.layers, 'layer')} fused, {done.dtype}, {size(done.bytes)}")
        typer.echo(
            f"logits on three prompts: the adapter moves them by up to {done.effect:.2g}, fusing by up to "
            f"{done.error:.2g} (rms {done.error_rms:.2g})"
        )
        if compared:
            typer.echo(
                f"verify: no missing and no unexpected key; max |logit difference| {done.torch_diff:.1e} in "
                f"transformers (bound {done.bound:.1e}): {'passed' if done.passed else 'FAILED'}"
            )

    report(asdict(done) | {"passed": done.passed if compared else None}, words)
    if compared and not done.passed:
        raise typer.Exit(1)
