"""Every format an adapter can leave in and come from."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_adapters import adapter, methods
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.adapter.reading import sound
from mlx_adapters.convert import adapterhub, llm_adapters, mlx_lm, peft
from mlx_adapters.convert.torch_bin import read_bin
from mlx_adapters.errors import AdapterError, ConfigError, reading, unknown
from mlx_adapters.files.writing import folder_bytes, writing
from mlx_adapters.models.load import LanguageModel

__all__ = ["FORMATS", "base_of", "detect", "export", "formats", "import_adapter"]

_OTHERS: dict[str, Any] = {"adapterhub": adapterhub, "llm-adapters": llm_adapters, "mlx-lm": mlx_lm}
FORMATS = ("peft", *_OTHERS)
_BIN = "adapter_model.bin"


def formats(method: str) -> list[str]:
    """The formats that have a method; what each can hold of it, its export says."""
    peft_too = ["peft"] if methods.find(method).IN_PEFT else []
    return peft_too + [name for name, module in _OTHERS.items() if method in module.METHODS]


def export(source: Path, dst: Path, *, format: str, base: str | None = None) -> int:
    """Write our adapter folder `source` in another format; returns the bytes written.

    Raises ConfigError for an unknown format or one that does not have the method, AdapterError for what the
    format cannot hold.
    """
    if format not in FORMATS:
        raise ConfigError(unknown("format", format, FORMATS))
    adapter.refuse_links(source)
    if format == "peft":
        return peft.export(source, dst, base=base).bytes
    _OTHERS[format].export(source, dst, base=base)
    return folder_bytes(dst)


def detect(folder: Path) -> str:
    """The format of an adapter folder; AdapterError says what was looked for."""
    if (folder / adapter.WEIGHTS).exists() and (folder / adapter.CONFIG).exists():
        return "peft"
    for name, module in _OTHERS.items():
        if module.detect(folder):
            return name
    if (folder / _BIN).exists() and (folder / adapter.CONFIG).exists():
        return "peft"  # of before 2023's safetensors
    raise AdapterError(
        f"{folder}: is no adapter folder. Looked for adapter_model.safetensors (PEFT), "
        "adapter_model.bin (old PEFT, LLM-Adapters), adapters.safetensors (mlx-lm), adapter.safetensors or "
        "pytorch_adapter.bin (AdapterHub)"
    )


def base_of(folder: Path) -> str | None:
    """The model, a path or a hub id, that an adapter folder says it is for."""
    fields = adapter.read_fields(folder)
    named = (fields.get(name) for name in ("base_model_name_or_path", "model", "model_name"))
    return next((name for name in named if isinstance(name, str) and name), None)


def import_adapter(source: Path, dst: Path, *, loaded: LanguageModel) -> AdapterMeta:
    """Write an adapter folder of any known format as ours, checked against the model it is for.

    `dst` appears when it is whole. Raises OutputError when it is not empty.
    """
    with reading(source, AdapterError), writing(dst) as folder:
        found = detect(source)
        adapter.refuse_links(source)
        if found in _OTHERS:
            imported: AdapterMeta = _OTHERS[found].import_adapter(source, folder, loaded=loaded)
            return imported
        with _with_safetensors(source) as readable:
            meta = adapter.load(loaded, readable)
            adapter.save(loaded.model, folder, meta=meta)
    return meta


@contextmanager
def _with_safetensors(source: Path) -> Iterator[Path]:
    """`source`, or a copy of it whose weights are no `.bin`."""
    if (source / adapter.WEIGHTS).exists():
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="mlx-adapters-import-") as name:
        copy = Path(name)
        shutil.copyfile(source / adapter.CONFIG, copy / adapter.CONFIG)
        mx.save_safetensors(str(copy / adapter.WEIGHTS), sound(read_bin(source / _BIN), source / _BIN))
        try:
            yield copy
        except AdapterError as error:
            said = str(error).replace(str(copy / adapter.WEIGHTS), str(source / _BIN))
            raise AdapterError(said.replace(str(copy), str(source))) from None
