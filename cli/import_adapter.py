"""`mlx-adapters import SRC DST`."""

from pathlib import Path
from typing import Annotated

from mlx_adapters.cli.options import NewFolder, arg, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.screen import ended


@reporting("path", "method", "format")
def command(
    src: Annotated[Path, arg("adapter folder or hub id of PEFT, AdapterHub, mlx-lm or LLM-Adapters")],
    dst: NewFolder,
    model: Annotated[str | None, opt("model folder or hub id it is for [default: the one it names]")] = None,
) -> None:
    """Convert another library's adapter to an adapter folder of this package.

    The files tell the format: PEFT's, AdapterHub's, mlx-lm's or LLM-Adapters'.
    """
    from mlx_adapters.api import import_adapter
    from mlx_adapters.convert import exchange
    from mlx_adapters.next_steps import after_adapter
    from mlx_adapters.train.trainer import check_output

    found = exchange.detect(src)
    check_output(dst, False)
    meta = import_adapter(src, dst, model=model)
    text = f"{dst}: {meta.method.NAME}, from a folder of {found}"
    report(
        {"path": dst, "method": meta.method.NAME, "format": found},
        lambda: ended(text, after_adapter(dst, model, meta)),
    )
