"""A repository of the Hugging Face hub as a folder of this machine."""

from collections.abc import Sequence
from pathlib import Path

from mlx_adapters.errors import AdaptersError, first_line

__all__ = ["snapshot"]


def snapshot(
    name: str, patterns: Sequence[str], kind: type[AdaptersError], *, revision: str | None = None
) -> Path:
    """The folder of the hub's cache that holds those files of a repository, fetched where they are not there.

    Args:
        name: The hub id, `OWNER/NAME`.
        patterns: The files that are fetched, as globs.
        kind: The error to raise where the hub does not give them.
        revision: Branch, tag or commit.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises many unrelated types for "could not download"
        reason = first_line(error)
        raise kind(f"{name}: no such folder, and the hub did not give it ({reason})") from None
