"""`mlx-adapters push ADAPTER OWNER/NAME`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_adapters.cli.options import Adapter, Base, arg, opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.errors import ConfigError

_LICENSE = "the hub's name of the license, such as apache-2.0 [default: none named]"


@reporting("repo", "url", "sent", "path", "files")
def command(
    adapter: Adapter,
    repo: Annotated[str, arg("OWNER/NAME on the hub; made if it is not there")],
    base: Base = None,
    eval: Annotated[list[Path] | None, opt("report of eval --output, for the card; may be repeated")] = None,
    license: Annotated[str | None, opt(_LICENSE)] = None,
    private: Annotated[bool, opt("make a new repository private")] = False,
    dry_run: Annotated[bool, opt("write the folder to --output, upload nothing")] = False,
    output: Annotated[Path | None, opt("new folder for --dry-run")] = None,
) -> None:
    """Upload the adapter to the hub as a PEFT folder with a card.

    The card says method, data, scores, hashes, and how to load it.

    The token is that of `hf auth login` or HF_TOKEN.
    """
    from mlx_adapters.convert import publish
    from mlx_adapters.units import size

    if dry_run != (output is not None):
        raise ConfigError("--dry-run and --output FOLDER go together: the folder is written, nothing is sent")
    card = {"base": base, "license": license, "reports": eval or ()}
    prepared, url = publish.push(adapter, repo, output=output, private=private, **card)

    def words() -> None:
        for name, count, digest in prepared.files:
            typer.echo(f"{name}  {size(count)}  sha256 {digest}")
        typer.echo(url or f"{output}: would go to {repo}; nothing was sent")

    files = [{"name": name, "bytes": count, "sha256": digest} for name, count, digest in prepared.files]
    report({"repo": repo, "url": url, "sent": not dry_run, "path": output, "files": files}, words)
