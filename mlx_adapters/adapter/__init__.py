"""Adapters on a model, and the folders that hold them."""

from mlx_adapters.adapter.attach import attach, detach, load
from mlx_adapters.adapter.folder import (
    build,
    load_weights,
    own_tensors,
    save,
    tensors,
    write,
)
from mlx_adapters.adapter.located import located
from mlx_adapters.adapter.meta import AdapterMeta, read_meta
from mlx_adapters.adapter.reading import (
    CONFIG,
    META,
    SEEN,
    WEIGHTS,
    by_layer,
    read_fields,
    read_tensors,
    refuse_links,
    weights_file,
)
from mlx_adapters.adapter.tree import count, forget, layers, note

__all__ = [
    "CONFIG",
    "META",
    "SEEN",
    "WEIGHTS",
    "AdapterMeta",
    "attach",
    "build",
    "by_layer",
    "count",
    "detach",
    "forget",
    "layers",
    "load",
    "load_weights",
    "located",
    "note",
    "own_tensors",
    "read_fields",
    "read_meta",
    "read_tensors",
    "refuse_links",
    "save",
    "tensors",
    "weights_file",
    "write",
]
