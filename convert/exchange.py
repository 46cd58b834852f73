"""Every format an adapter can leave in and come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlx_adapters import adapter, methods
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.adapter.reading import BIN
from mlx_adapters.convert import adapterhub, llm_adapters, mlx_lm, peft
from mlx_adapters.errors import AdapterError, ConfigError, counted, reading, unknown
from mlx_adapters.files.writing import folder_bytes, writing
from mlx_adapters.models.load import LanguageModel
from mlx_adapters.units import size

__all__ = [
    "FORMATS",
    "Exported",
    "base_of",
    "base_to_verify",
    "detect",
    "export",
    "formats",
    "import_adapter",
    "in_words",
]


class _Format(Protocol):
    """A module that reads and writes another library's adapter folders."""

    @property
    def METHODS(self) -> tuple[str, ...]: ...
    def detect(self, folder: Path) -> bool: ...
    def export(self, source: Path, dst: Path, *, base: str | None = None) -> None: ...
    def import_adapter(self, source: Path, dst: Path, *, loaded: LanguageModel) -> AdapterMeta: ...


_OTHERS: dict[str, _Format] = {"adapterhub": adapterhub, "llm-adapters": llm_adapters, "mlx-lm": mlx_lm}
FORMATS = ("peft", *_OTHERS)


def formats(method: str) -> list[str]:
    """The formats that have a method; what each can hold of it, its export says."""
    peft_too = ["peft"] if methods.find(method).IN_PEFT else []
    return peft_too + [name for name, module in _OTHERS.items() if method in module.METHODS]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote to `path`. `tensors` is None where the format is not PEFT's; `base` is the model
    that the folder names, None for one that was neither given nor is PEFT's to name. `opened` is what PyTorch
    said of an architecture that the tests do not compare, empty for the others."""

    path: Path
    format: str
    tensors: int | None
    bytes: int
    base: str | None
    opened: str = ""


def export(source: Path, dst: Path, *, format: str, base: str | None = None) -> Exported:
    """Write an adapter folder in another format.

    Args:
        source: an adapter folder of this package or PEFT's, or its hub id.
        dst: the new folder; it may not hold anything.
        format: one of `FORMATS`.
        base: hub id (or path) that the other library loads the base from; by default the one that the adapter
            remembers.

    Returns:
        What was written: the path, the number of tensors (PEFT only), bytes, and the base.

    Raises:
        ConfigError: the format is unknown, or does not have the method.
        AdapterError: the folder is not an adapter, or the format cannot hold it.
        OutputError: `dst` is not empty or cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(unknown("format", format, FORMATS))
    source = adapter.located(source)
    adapter.refuse_links(source)
    if format == "peft":
        done = peft.export(source, dst, base=base)
        return Exported(
            path=dst, format=format, **{k: getattr(done, k) for k in ("tensors", "bytes", "base", "opened")}
        )
    _OTHERS[format].export(source, dst, base=base)
    return Exported(path=dst, format=format, tensors=None, bytes=folder_bytes(dst), base=base)


def in_words(done: Exported, meta: AdapterMeta) -> list[str]:
    """What people read of an export: what was written, and how PyTorch loads what PEFT does not have."""
    if done.tensors is None:
        return [f"{done.path}: {done.format}, {size(done.bytes)}"]
    written = f"{done.path}: {counted(done.tensors, 'tensor')}, {size(done.bytes)}, base {done.base}"
    if meta.method.IN_PEFT:
        return [written, *filter(None, [done.opened])]
    name = meta.method.NAME
    others = "".join(f", or export it with --format {other}" for other in formats(name))
    loader = f"in PyTorch, load it with the load_adapter.py in the folder{others}"
    return [written, f"PEFT has no {name}: {loader}"]


def base_to_verify(meta: AdapterMeta, format: str, model: Path | None) -> Path:
    """The base model's folder for `peft.verify`: `model`, or the one that the adapter was trained on. Raises
    ConfigError, before anything is written, where there is none or PEFT cannot open the result."""
    if format != "peft":
        raise ConfigError("--verify opens the folder with PEFT: leave it out, or export to peft")
    if not meta.method.IN_PEFT:
        raise ConfigError(
            f"--verify opens the folder with PEFT, which has no {meta.method.NAME}: leave it out"
        )
    folder = model or Path(meta.base.get("path", ""))
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"--verify needs the model the adapter was trained on, not found at {folder}: give --model"
        )
    return folder


def detect(folder: Path) -> str:
    """The format of an adapter folder; AdapterError says what was looked for."""
    folder = adapter.located(folder)
    if (folder / adapter.WEIGHTS).exists() and (folder / adapter.CONFIG).exists():
        return "peft"
    for name, module in _OTHERS.items():
        if module.detect(folder):
            return name
    if (folder / BIN).exists() and (folder / adapter.CONFIG).exists():
        return "peft"  # of before 2023's safetensors
    raise AdapterError(
        f"{folder}: is not an adapter folder. Looked for adapter_model.safetensors (PEFT), "
        "adapter_model.bin (old PEFT, LLM-Adapters), adapters.safetensors (mlx-lm), adapter.safetensors or "
        "pytorch_adapter.bin (AdapterHub)"
    )


def base_of(folder: Path) -> str | None:
    """The model, a path or a hub id, that an adapter folder says it is for."""
    fields = adapter.read_fields(adapter.located(folder))
    named = (fields.get(name) for name in ("base_model_name_or_path", "model", "model_name"))
    return next((name for name in named if isinstance(name, str) and name), None)


def import_adapter(source: Path, dst: Path, *, loaded: LanguageModel) -> AdapterMeta:
    """Write an adapter folder of any known format as one of this package.

    Args:
        source: the folder or hub id; its format is detected from its files.
        dst: the new folder, which appears when it is whole.
        loaded: the bare model that the adapter is for: every name and shape is checked against it. It carries
            the adapter afterwards.

    Returns:
        The adapter's meta data.

    Raises:
        AdapterError: the folder is damaged, of another model, or holds what is not supported.
        OutputError: `dst` is not empty or cannot be written.
    """
    source = adapter.located(source)
    with reading(source, AdapterError), writing(dst) as folder:
        found = detect(source)
        adapter.refuse_links(source)
        if found in _OTHERS:
            return _OTHERS[found].import_adapter(source, folder, loaded=loaded)
        meta = adapter.load(loaded, source)
        adapter.save(loaded.model, folder, meta=meta)
    return meta
