"""What the functions of the front door take for a model and an adapter: objects, folders, hub ids, names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_adapters.adapter import AdapterMeta, multi, read_meta
from mlx_adapters.adapter.tree import adapter_set
from mlx_adapters.models.load import LanguageModel, load

__all__ = ["meta_of", "opened", "using"]


def opened(model: LanguageModel | str | Path) -> LanguageModel:
    """The model itself, or the one of that folder or hub id, loaded for answering."""
    return model if isinstance(model, LanguageModel) else load(model, answering=True)


def meta_of(model: LanguageModel | str | Path, adapter: str | Path | None) -> AdapterMeta | None:
    """What the adapter that `using` would take says of itself; None for the bare base. Loads nothing."""
    loaded = adapter_set(model.model) if isinstance(model, LanguageModel) else None
    name = str(adapter) if adapter is not None else loaded.active[-1] if loaded and loaded.active else None
    if name is None:
        return None
    meta: AdapterMeta = loaded.metas[name] if loaded and name in loaded.metas else read_meta(Path(name))
    return meta


@contextmanager
def using(loaded: LanguageModel, adapter: str | Path | None) -> Iterator[None]:
    """Inside, the model answers with `adapter`: a folder, or the name of one that `load_adapters` has loaded.
    None leaves the model as it is.

    A folder is loaded for the block alone, so the files that count are those that are there now. Afterwards
    the adapter that was active before is active again.
    """
    if adapter is None:
        yield
        return
    model, name = loaded.model, str(adapter)
    before, temporary = multi.active(model), name not in multi.names(model)
    if temporary:
        multi.load_adapters(loaded, {name: adapter})
    try:
        multi.activate(model, name)
        yield
    finally:
        multi.activate(model, before)
        if temporary:
            multi.unload(model, name)
