"""What the path of a module says: its block, its role in it, and its name in the Hugging Face checkpoint."""

import re
from dataclasses import dataclass

import mlx.nn as nn

from mlx_adapters.errors import UnsupportedError
from mlx_adapters.models.architectures.row import Architecture
from mlx_adapters.models.architectures.table import architecture
from mlx_adapters.models.blocks import layer_index

__all__ = [
    "Site",
    "embedding",
    "from_hf",
    "is_embedding",
    "is_head",
    "is_position",
    "is_rotary",
    "is_table",
    "layer_index",
    "linears",
    "matches",
    "side",
    "tied",
    "to_hf",
    "twisted_head",
]


@dataclass(frozen=True, kw_only=True)
class Site:
    """The place of an adapter: `role` is `attn`, `mlp` or empty; `side` is `pre` for a layer into a sublayer,
    `post` for the layer out of it."""

    path: str
    model_type: str
    role: str
    side: str


_EMBEDDINGS = (
    *("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "token_embeddings"),
    *("embeddings", "embedding", "embed"),
)
_HEADS = ("lm_head", "embed_out", "output_layer")
_POSITIONS = re.compile(r"(?:wpe|embed_positions|position_embeddings)$")
_ROTARY = re.compile(r"rope$|rotary", re.IGNORECASE)
_TWISTS = (
    *("final_logit_softcapping", "final_logits_softcap", "logit_scale", "logits_scaling"),
    "output_multiplier",
)
# gemma3n and kimi_k3 do not call these layers: they read their weights
_READ = re.compile(r"\.altup\.|_res_proj$")


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer inside the decoder's blocks, by path; the output head is not one of them."""
    unused = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if getattr(module, "is_kv_shared_layer", False)  # gemma3n: its keys and values are another layer's
        for name in ("k_proj", "v_proj")
    }
    found = {
        path: module
        for path, module in model.named_modules()
        if path not in unused
        and isinstance(module, (nn.Linear, nn.QuantizedLinear))
        and layer_index(path) is not None
        # a model file's own kind of linear layer computes something else: afm7's returns a list
        and not type(module).__module__.startswith("mlx_lm.")
        and not _READ.search(path)
    }
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def matches(path: str, name: str) -> bool:
    """Whether `name`, a last part like `q_proj` or `mlp.c_proj`, names `path`."""
    return path == name or path.endswith("." + name)


def side(path: str, row: Architecture) -> str:
    """`post` for the last linear layer of a sublayer, `pre` for the others."""
    outs = (row.attn_out, row.mlp_out, *row.other_outs)
    return "post" if any(matches(path, name) for name in outs) else "pre"


def embedding(model: nn.Module, *, alone: bool = False) -> str:
    """The path of the token embedding; UnsupportedError where none has a known name.

    With `alone` also where tokens are looked up in further tables, by layer or by n-gram: ids behind the
    vocabulary mean nothing there.
    """
    tables = [p for p, m in model.named_modules() if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding))]
    found = [path for path in tables if is_table(path)]
    if not found:
        raise UnsupportedError(f"no token embedding named {' or '.join(_EMBEDDINGS)} was found in this model")
    others = [path for path in tables if path != found[0] and not _POSITIONS.search(path)]
    if alone and others:
        raise UnsupportedError(
            f"this model looks tokens up in another table too ({others[0]}), which has no rows for virtual "
            "tokens. Use lora"
        )
    return found[0]


def is_table(path: str) -> bool:
    """Whether `path` has the name of a token embedding."""
    return path.rpartition(".")[2] in _EMBEDDINGS


def is_head(path: str) -> bool:
    """Whether `path` has the name of an output head."""
    return path.rpartition(".")[2] in _HEADS


def tied(model: nn.Module) -> bool:
    """Whether the output head is the token embedding."""
    return not any(is_head(path) for path, _ in model.named_modules())


def is_embedding(path: str) -> bool:
    """Whether a part of `path` has the name of a token embedding: also below an adapter in its place."""
    return any(part in _EMBEDDINGS for part in path.split(".")) and not is_position(path)


def is_position(path: str) -> bool:
    """Whether `path` has the name of a table of learned positions."""
    return bool(_POSITIONS.search(path))


def is_rotary(module: nn.Module) -> bool:
    """Whether `module` turns queries and keys by their positions. By name: each model file has its own."""
    return bool(_ROTARY.search(type(module).__name__))


def twisted_head(model: nn.Module) -> bool:
    """Whether a field of the model's configuration caps or scales the logits behind the output head."""
    arguments = getattr(model, "args", None)
    return any(getattr(arguments, name, None) for name in _TWISTS)


def to_hf(path: str, model_type: str) -> str:
    """A path of the MLX module tree as the Hugging Face checkpoint writes it."""
    return architecture(model_type).to_hf(path)


def from_hf(path: str, model_type: str) -> str:
    """The inverse of `to_hf`."""
    return architecture(model_type).from_hf(path)


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
