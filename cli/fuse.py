"""`mlx-adapters fuse MODEL DST --adapter DIR`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from mlx_adapters.cli.complete import TARGETS
from mlx_adapters.cli.options import Dtype, Mode, NewFolder, arg, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.screen import ended, say

_KEYS = ("path", "bytes", "dtype", "layers", "effect", "error", "error_rms", "torch_diff", "bound", "passed")


@reporting(*_KEYS)
def command(
    model: Annotated[str, arg("model folder or hub id the adapter was trained on")],
    dst: NewFolder,
    adapter: Annotated[Path, opt("adapter folder or hub id, OWNER/NAME[@REVISION]")],
    to: Annotated[
        str, opt("transformers: a Hugging Face checkpoint; mlx: an MLX folder", values=TARGETS)
    ] = "transformers",
    dtype: Dtype = None,
    bits: Annotated[int | None, opt("with --to mlx: quantize the fused weights again")] = None,
    group_size: Annotated[int | None, opt("weights that share a scale")] = None,
    mode: Mode = "affine",
    verify: Annotated[bool, opt("open the checkpoint with transformers and compare")] = False,
) -> None:
    """Merge an adapter into its base, for use without any library."""
    from mlx_adapters.convert.fuse import fuse
    from mlx_adapters.next_steps import after_fuse

    done = fuse(
        model, adapter, dst, to=to, dtype=dtype, bits=bits, group_size=group_size, mode=mode, verify=verify
    )
    if done.error > 0.1 * done.effect:
        say("warning: rounding the fused weights undoes part of what the adapter learned; use more bits")
    passed = done.passed if done.torch_diff is not None else None
    report(
        asdict(done) | {"passed": passed},
        lambda: ended(str(done), after_fuse(dst)),
        passed=passed is not False,
    )
