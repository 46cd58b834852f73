"""`mlx-adapters push ADAPTER OWNER/NAME`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_adapters.cli.report import report, reporting
from mlx_adapters.errors import ConfigError

__all__ = ["command"]


@reporting("repo", "url", "sent", "path", "files")
def command(
    adapter: Annotated[Path, typer.Argument(help="adapter folder")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if it is not there")],
    base: Annotated[
        str | None, typer.Option(help="hub id of the base [default: the one it was named by]")
    ] = None,
    eval: Annotated[
        list[Path] | None, typer.Option(help="report of eval --output, for the card; may be repeated")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="the hub's name of the license: apache-2.0 say [default: none named]")
    ] = None,
    private: Annotated[bool, typer.Option(help="a new repository is private")] = False,
    dry_run: Annotated[bool, typer.Option(help="write the folder to --output, upload nothing")] = False,
    output: Annotated[Path | None, typer.Option(help="new folder for --dry-run")] = None,
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
