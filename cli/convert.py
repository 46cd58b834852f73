"""`mlx-adapters convert SRC DST`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_adapters.cli import complete
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import duration, say, size

if TYPE_CHECKING:
    from mlx_adapters.convert.verify import ModelVerdict

__all__ = ["command"]


@reporting("path", "parameters", "bytes", "bits_per_weight", "dtype", "seconds", "verify")
def command(
    src: Annotated[str, typer.Argument(help="hub id, folder, or .gguf file")],
    dst: Annotated[Path, typer.Argument(help="new folder to write")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id")] = None,
    bits: Annotated[int | None, typer.Option(help="quantize to 2, 3, 4, 5, 6 or 8 bits")] = None,
    group_size: Annotated[int | None, typer.Option(help="weights that share a scale: 32, 64 or 128")] = None,
    mode: Annotated[
        str,
        typer.Option(help="affine, mxfp4, mxfp8 or nvfp4", autocompletion=complete.among(complete.MODES)),
    ] = "affine",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="mixed precision: mixed_2_6, mixed_3_4, ...",
            autocompletion=complete.among(complete.RECIPES),
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16; default: the source's",
            autocompletion=complete.among(complete.DTYPES),
        ),
    ] = None,
    verify: Annotated[bool, typer.Option(help="compare the logits with transformers")] = False,
) -> None:
    """Convert a checkpoint to an MLX folder, quantized if asked.

    SRC is a Hugging Face checkpoint on the hub or in a folder, or a .gguf file.
    """
    from mlx_adapters.convert.checkpoint import convert

    say(f"Converting {src}")
    done = convert(
        src, dst, revision=revision, bits=bits, group_size=group_size, mode=mode, recipe=recipe, dtype=dtype
    )
    verdict = _verify(src, dst) if verify else None

    def words() -> None:
        typer.echo(
            f"{done.path}: {done.parameters / 1e6:.1f} M parameters, {size(done.bytes)}, "
            f"{done.bits_per_weight:.2f} bits per weight ({done.dtype}), {duration(done.seconds)}"
        )
        if verdict:
            typer.echo(_text(verdict))

    checked = verdict and asdict(verdict) | {"passed": verdict.passed}
    report(asdict(done) | {"verify": checked}, words)
    if verdict and not verdict.passed:
        raise typer.Exit(1)


def _verify(src: str, dst: Path) -> "ModelVerdict":
    from mlx_adapters.convert.verify import verify_model

    say("Comparing with transformers ...")
    return verify_model(src, dst)


def _text(verdict: "ModelVerdict") -> str:
    against = "transformers" if verdict.lossless else "transformers with the same rounded weights"
    return (
        f"verify: max |logit difference| {verdict.max_diff:.1e} to {against} (bound {verdict.bound:.1e}), "
        f"same most likely token as the source at {verdict.argmax_agreement:.1%} of positions: "
        f"{'passed' if verdict.passed else 'FAILED'}"
    )
