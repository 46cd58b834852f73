"""Every format an adapter can leave in and come from."""

from pathlib import Path
from typing import Any

from mlx_adapters import adapter
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.convert import adapterhub, llm_adapters, mlx_lm, peft
from mlx_adapters.errors import AdapterError, ConfigError, unknown
from mlx_adapters.model import Loaded

__all__ = ["FORMATS", "detect", "export", "import_adapter"]

_OTHERS: dict[str, Any] = {"adapterhub": adapterhub, "llm-adapters": llm_adapters, "mlx-lm": mlx_lm}
FORMATS = ("peft", *_OTHERS)


def export(source: Path, dst: Path, *, format: str, base: str | None = None) -> int:
    """Write our adapter folder `source` in another format; returns the bytes written.

    Raises ConfigError for an unknown format or one that does not have the method, AdapterError for what the
    format cannot hold.
    """
    if format not in FORMATS:
        raise ConfigError(unknown("format", format, FORMATS))
    if format == "peft":
        return peft.export(source, dst, base=base).bytes
    _OTHERS[format].export(source, dst, base=base)
    return sum(file.stat().st_size for file in dst.iterdir())


def detect(folder: Path) -> str:
    """The format of an adapter folder; AdapterError says what was looked for."""
    if (folder / adapter.WEIGHTS).exists() and (folder / adapter.CONFIG).exists():
        return "peft"
    for name, module in _OTHERS.items():
        if module.detect(folder):
            return name
    raise AdapterError(
        f"{folder}: is no adapter folder. Looked for adapter_model.safetensors (PEFT), "
        "adapter_model.bin (old PEFT, LLM-Adapters), adapters.safetensors (mlx-lm), adapter.safetensors or "
        "pytorch_adapter.bin (AdapterHub)"
    )


def import_adapter(source: Path, dst: Path, *, loaded: Loaded) -> AdapterMeta:
    """Write an adapter folder of any known format as ours, checked against the model it is for."""
    found = detect(source)
    if found == "peft":
        meta = adapter.load(loaded, source)
        adapter.save(dst, loaded.model, meta=meta)
        return meta
    imported: AdapterMeta = _OTHERS[found].import_adapter(source, dst, loaded=loaded)
    return imported
