"""`mlx-adapters convert SRC DST`."""

from dataclasses import asdict
from typing import Annotated

from mlx_adapters.cli.complete import RECIPES
from mlx_adapters.cli.options import Dtype, Mode, NewFolder, arg, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.screen import ended, say


@reporting("path", "parameters", "bytes", "bits_per_weight", "dtype", "seconds", "remark", "verify")
def command(
    src: Annotated[str, arg("hub id, folder, or .gguf file")],
    dst: NewFolder,
    revision: Annotated[str | None, opt("branch, tag or commit of a hub id")] = None,
    bits: Annotated[int | None, opt("quantize to 2, 3, 4, 5, 6 or 8 bits")] = None,
    group_size: Annotated[int | None, opt("weights that share a scale: 32, 64 or 128")] = None,
    mode: Mode = "affine",
    recipe: Annotated[str | None, opt("mixed precision: mixed_2_6, mixed_3_4, ...", values=RECIPES)] = None,
    dtype: Dtype = None,
    verify: Annotated[bool, opt("compare the logits with transformers")] = False,
) -> None:
    """Convert a checkpoint to an MLX folder, quantized if asked.

    SRC is a Hugging Face checkpoint on the hub or in a folder, or a .gguf file.
    """
    from mlx_adapters.convert.checkpoint import convert
    from mlx_adapters.next_steps import after_convert

    say(f"Converting {src}")
    done = convert(
        src, dst, revision=revision, bits=bits, group_size=group_size, mode=mode, recipe=recipe, dtype=dtype
    )
    if done.remark:
        say(done.remark)
    verdict = None
    if verify:
        from mlx_adapters.convert.verify import verify_model

        say("Comparing with transformers ...")
        verdict = verify_model(src, dst)

    text = f"{done}\n{verdict}" if verdict else str(done)
    checked = verdict and asdict(verdict) | {"passed": verdict.passed}
    passed = not verdict or verdict.passed
    report(asdict(done) | {"verify": checked}, lambda: ended(text, after_convert(dst)), passed=passed)
