"""Writing all or nothing: what existed before, or what shall be there, never something in between."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_adapters.errors import AdaptersError, CheckpointError, OutputError, writing_to
from mlx_adapters.units import size

__all__ = [
    "folder_bytes",
    "refuse_existing",
    "refuse_links_out",
    "require_space",
    "write_json",
    "write_whole",
    "writing",
]

_FULL = (errno.ENOSPC, errno.EDQUOT)
# MLX's C++ writer reports a short write in its own words, without an errno
_FULL_WORDS = ("no space left", "failed to write", "unable to write", "write failed")


def write_whole(file: Path, content: str | bytes) -> None:
    """Write beside `file`, then rename: a kill on the way, or a full disk, leaves what was there before."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, value: Any) -> None:
    """Write `file` and the folders above it, whole or not at all; OutputError where that fails."""
    with writing_to(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(value, indent=1) + "\n")


@contextmanager
def writing(dst: Path) -> Iterator[Path]:
    """Give a temporary sibling of `dst` to write to; it becomes `dst` when the block ends without an error.

    `dst` may not exist, or be an empty folder. OutputError if it holds something, cannot be written, or the
    disk fills up; the temporary folder is removed then, and an existing `dst` is untouched.
    """
    dst = Path(dst)
    refuse_existing(dst)
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", suffix=".part", dir=dst.parent))
    except OSError as error:
        raise _output_error(dst, error) from None
    try:
        yield temporary
        _publish(temporary, dst)
    except OutputError as error:  # of what writes a folder, whose name here is not the user's
        raise OutputError(str(error).replace(str(temporary), str(dst))) from None
    except (OSError, RuntimeError) as error:
        if _is_ours(error, temporary):
            raise _output_error(dst, error) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder and below it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def require_space(dst: Path, needed: int) -> None:
    """OutputError when the disk of `dst` has less than `needed` bytes free."""
    folder = Path(dst).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{dst}: needs about {size(needed)}, and {size(free)} are free on its disk. "
            "Free some space or choose another place"
        )


def refuse_links_out(
    folder: Path, files: Iterable[Path], kind: type[AdaptersError] = CheckpointError
) -> None:
    """Raise `kind` where one of `files` is a link that leads out of `folder`.

    Somebody else's folder could link to any file of this machine, and what is written would hold its content.
    The hub's cache is the exception: its snapshots are links to the blobs beside them.
    """
    root = folder.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for file in files:
        real = file.resolve()
        if not any(real.is_relative_to(place) for place in allowed):
            raise kind(
                f"{file}: is a link that leads out of its folder, to {real}; refused. Copy the file there"
            )


def refuse_existing(dst: Path) -> None:
    """OutputError when `dst` holds something."""
    if dst.is_dir():
        if any(dst.iterdir()):
            raise OutputError(f"{dst}: exists and is not empty. Choose another folder, or remove it first")
    elif dst.exists() or dst.is_symlink():
        raise OutputError(f"{dst}: exists and is not a folder. Choose another place")


def _publish(temporary: Path, dst: Path) -> None:
    # mkdtemp makes private folders; a model folder gets what the user's umask gives any other folder
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o777 & ~mask)
    refuse_existing(dst)  # again: another process may have been faster
    if dst.is_dir():
        dst.rmdir()
    temporary.rename(dst)


def _is_ours(error: Exception, temporary: Path) -> bool:
    """Whether the error is about writing the output, not about a file the block read."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    names = str(error)
    if isinstance(error, OSError):
        names += f" {error.filename} {error.filename2}"
        return str(temporary) in names
    return any(words in names.lower() for words in _FULL_WORDS)


def _output_error(dst: Path, error: Exception) -> OutputError:
    if isinstance(error, OSError) and error.errno not in _FULL:
        return OutputError(f"{dst}: cannot be written ({error.strerror or error}). Choose another place")
    return OutputError(f"{dst}: no space left on its disk. Free some space or choose another place")
