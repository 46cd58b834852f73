"""Files that are written whole: as they were before, or as they shall be, never in between."""

from pathlib import Path

__all__ = ["write_whole"]


def write_whole(file: Path, content: str | bytes) -> None:
    """Write beside `file`, then rename: a kill on the way, or a full disk, leaves what was there before."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
