"""What the functions of the front door take for a model and an adapter: objects, folders, hub ids, names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_adapters.adapter import AdapterMeta, located, multi, read_meta
from mlx_adapters.adapter.tree import adapter_set, attached
from mlx_adapters.models.load import LanguageModel, load

__all__ = ["fetched", "meta_of", "opened", "using"]


def opened(model: LanguageModel | str | Path) -> LanguageModel:
    """The model itself, or the one of that folder or hub id, loaded for answering."""
    return model if isinstance(model, LanguageModel) else load(model, answering=True)


def fetched(model: LanguageModel | str | Path, adapter: str | Path | None) -> str | Path | None:
    """`adapter` as `using` takes it, where a hub id has become its folder: the hub is asked once."""
    if adapter is None or (isinstance(model, LanguageModel) and str(adapter) in multi.names(model.model)):
        return adapter
    return located(adapter)


def meta_of(model: LanguageModel | str | Path, adapter: str | Path | None) -> AdapterMeta | None:
    """What the adapter that `using` would take says of itself; None for the bare base. Loads nothing."""
    name = None if adapter is None else str(adapter)
    if isinstance(model, LanguageModel):
        held, single = adapter_set(model.model), attached(model.model)
        if name is None and single is not None:
            return single.meta
        if name is None and held is not None and held.active:
            name = held.active[-1]
        if held is not None and name in held.metas:
            return held.metas[name]
    return None if name is None else read_meta(name)


@contextmanager
def using(loaded: LanguageModel, adapter: str | Path | None) -> Iterator[None]:
    """Inside, the model answers with `adapter`: a folder, a hub id, or the name of one that `load_adapters`
    has loaded. None leaves the model as it is.

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
