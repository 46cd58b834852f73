"""`mlx-adapters push ADAPTER OWNER/NAME`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_adapters.cli.options import Adapter, Base, arg, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.errors import ConfigError


@reporting("repo", "url", "sent", "path", "files")
def command(
    adapter: Adapter,
    repo: Annotated[str, arg("OWNER/NAME on the hub; made if it is not there")],
    base: Base = None,
    eval: Annotated[list[Path] | None, opt("report of eval --output, for the card; may be repeated")] = None,
    license: Annotated[
        str | None, opt("the hub's name of the license, such as apache-2.0 [default: none named]")
    ] = None,
    private: Annotated[bool, opt("make a new repository private")] = False,
    dry_run: Annotated[bool, opt("write the folder to --output, upload nothing")] = False,
    output: Annotated[Path | None, opt("new folder for --dry-run")] = None,
) -> None:
    """Upload the adapter to the hub as a PEFT folder with a card.

    The card says method, data, scores, hashes, and how to load it.

    The token is that of `hf auth login` or HF_TOKEN.
    """
    import tempfile

    from mlx_adapters.convert import publish
    from mlx_adapters.units import size

    if dry_run != (output is not None):
        raise ConfigError("--dry-run and --output FOLDER go together: the folder is written, nothing is sent")
    with tempfile.TemporaryDirectory(prefix="mlx-adapters-push-") as temporary:
        folder = output or Path(temporary) / "adapter"
        prepared = publish.prepare(adapter, folder, repo, base=base, license=license, reports=eval or ())
        url = None if dry_run else publish.upload(prepared, repo, private=private)

    def words() -> None:
        for name, count, digest in prepared.files:
            typer.echo(f"{name}  {size(count)}  sha256 {digest}")
        typer.echo(url or f"{folder}: would go to {repo}; nothing was sent")

    files = [{"name": name, "bytes": count, "sha256": digest} for name, count, digest in prepared.files]
    report({"repo": repo, "url": url, "sent": not dry_run, "path": output, "files": files}, words)
