"""Where an adapter is: its folder, or a snapshot of its hub id.

Wherever an adapter's folder is taken, so is `OWNER/NAME`, or `OWNER/NAME@REVISION`.
"""

from pathlib import Path

from mlx_adapters.adapter.reading import BIN, CONFIG, MEMBERS, META, SEEN, WEIGHTS
from mlx_adapters.errors import AdapterError
from mlx_adapters.files.hub import snapshot
from mlx_adapters.models.origin import is_hub_id

__all__ = ["located", "short_name"]

# Ours and PEFT's; then what mlx-lm and AdapterHub write, for `import`.
_FILES = (
    *(CONFIG, WEIGHTS, BIN, META, SEEN, f"{MEMBERS}/*"),
    *("adapters.safetensors", "adapter.safetensors", "pytorch_adapter.bin", "head_config.json"),
)


def located(source: str | Path) -> Path:
    """The folder of an adapter: `source` itself, or what the hub has by that id.

    Raises:
        AdapterError: The hub does not give it.
    """
    name, revision = _hub_id(source)
    return Path(source) if name is None else snapshot(name, _FILES, AdapterError, revision=revision)


def short_name(source: str | Path) -> str:
    """What an adapter is called where nothing else is said: the last part of its folder or its hub id."""
    return Path(_hub_id(source)[0] or source).resolve().name


def _hub_id(source: str | Path) -> tuple[str | None, str | None]:
    """(hub id, revision); no id for a folder of this machine, or what cannot be an id."""
    name, _, revision = str(source).partition("@")
    if Path(source).exists() or not is_hub_id(name):
        return None, None
    return name, revision or None
