"""The layers of an architecture whose row does not name them, from the paths of its linear layers alone.

A layer's role follows from the names of the modules that hold it, in mlx-lm's model files. What mixes tokens
is `attn` (attention, linear attention, state-space and convolution blocks), what does not is `mlp`. Layers
that only choose or weigh (routers of experts, indexers of sparse attention, gates of linear attention, the
model's own low-rank factors) have no role: they are no default target, but can be named.
"""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import mlx.nn as nn

from mlx_adapters.models.architectures.row import Architecture
from mlx_adapters.models.architectures.table import architecture
from mlx_adapters.models.sites import layer_index, linears

__all__ = ["architecture_of", "discover"]

_NO_ROLE = {
    *("gate", "router", "classifier", "coefficient", "wg", "shared_expert_gate"),  # of experts
    *("in_proj_a", "in_proj_b", "in_proj_ba", "a_proj", "b_proj"),  # a number per head
    *("indexer", "altup", "laurel", "lora", "per_layer_input_gate", "per_layer_projection"),
}
_ATTN = re.compile(r"att|mixer|mamba|conv$|ssm|temporal_block")
_MLP = re.compile(r"mlp|ffn|feed_forward|moe|expert")
_IN_MLP = re.compile(r"(gate|up|down|gate_up)_proj|fc\d|w\d")

# What a projection into the token mixer computes. Fused ones hold queries, keys and values in one matrix; so
# do the input projections of state-space and convolution blocks. In multi-head latent attention the queries,
# and the keys with the values, come from low-rank factors.
_FUSED = re.compile(r".*qkv.*|q_k_v_proj|query_key_value|W_pack|c_attn|in_proj|linear_x")
_QUERY = re.compile(r"q_proj|c_q|r_proj|attn_query|q_[ab]_proj")
_KEY = re.compile(r"k_proj|c_k|attn_key")
_VALUE = re.compile(r"v_proj|c_v|attn_value|kv_proj|kv_[ab]_proj.*")
_OUT = re.compile(
    r"o_proj|out_proj|o_b_proj|dense|wo|c_proj|attn_resid|linear_out"
    r"|down_proj|fc2|dense_4h_to_h|fc_out|mlp_resid|output_linear|proj_2"
)
_OUT_ELSE = re.compile(r"w2|value")  # into the sublayer where one of the others leads out of it


# (norm before attention, norm before the MLP) of a block that holds these norms, those behind, and no others:
# beside others the same names may mean something else. `test_discovery.py` checks each by running it.
_NORMS: dict[frozenset[str], tuple[str, str]] = {
    frozenset((*before, *behind)): before
    for before, behind in (
        (("input_layernorm", "post_attention_layernorm"), ()),
        (("input_layernorm", "pre_ff_layernorm"), ()),
        (("attention_layernorm", "feedforward_layernorm"), ()),
        (("attention_norm", "ffn_norm"), ()),
        (("attn_norm", "ffn_norm"), ()),
        (("operator_norm", "ffn_norm"), ()),
        (("temporal_pre_norm", "channel_pre_norm"), ()),
        (("ln_1", "ln_2"), ()),
        (
            ("input_layernorm", "pre_feedforward_layernorm"),
            ("post_attention_layernorm", "post_feedforward_layernorm"),
        ),
        (("input_layernorm", "pre_mlp_layernorm"), ("post_attention_layernorm", "post_mlp_layernorm")),
        (("pre_mixer_norm", "pre_mlp_norm"), ("post_mixer_norm", "post_mlp_norm")),
    )
}


def architecture_of(model: nn.Module, model_type: str) -> Architecture:
    """The row of `model_type`, with the layers of `model` where the table does not name them.

    `model` is the bare network: an adapter on it changes the paths that are looked for.
    """
    row = architecture(model_type)
    if row.attn:
        return row
    norms, stacked = [], []
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind.endswith("SwitchLinear"):
            stacked.append(path)
        # hyper-connections mix several residual streams: nothing reads the one there would be
        elif (
            re.search(r"norm|connection", kind, re.IGNORECASE)
            and layer_index(path) is not None
            and path.rpartition(".")[0][-1].isdigit()
        ):
            norms.append(path)
    return replace(row, **discover(list(linears(model)), norms, stacked))


def discover(paths: list[str], norms: list[str], stacked: list[str]) -> dict[str, Any]:
    """The fields of `Architecture` that follow from the paths of the linear layers in the blocks, of the
    norms that blocks hold themselves, and of layers that hold stacked experts."""
    roles = {path: _role(path) for path in paths}
    attn, mlp, unknown = ([path for path in paths if roles[path] == r] for r in ("attn", "mlp", "unknown"))
    attn = attn if attn or mlp else unknown
    if set(map(_block, stacked)) - set(map(_block, mlp)):
        mlp = []  # to adapt the MLPs of some blocks only is nothing to do by default
    queries, keys, values, fused = (_chosen(attn, kind) for kind in (_QUERY, _KEY, _VALUE, _FUSED))
    # where none of the names is known in some blocks, all names of those are taken
    rest = _in_other_blocks(attn, {*queries, *keys, *values, *fused})
    attn_out, mlp_out = (_chosen(found, _OUT) or _chosen(found, _OUT_ELSE) for found in (attn, mlp))
    attn_outs, mlp_outs = _by_count(attn_out), _by_count(mlp_out)
    named = {
        "attn": attn,
        "mlp": mlp,
        "lora": queries + values + fused + rest,
        "parallel": queries + keys + values + fused + rest,
        "ia3": keys + values + fused + rest + mlp_out,
    }
    fields: dict[str, Any] = {key: _names(found, paths) for key, found in named.items()}
    attn_names, mlp_names = _names(attn_outs, paths), _names(mlp_outs, paths)
    return fields | {
        "attn_out": attn_names[0] if attn_names else "",
        "mlp_out": mlp_names[0] if mlp_names else "",
        "other_outs": attn_names[1:] + mlp_names[1:],
        **_before(norms),
    }


def _before(norms: list[str]) -> dict[str, str | None]:
    """The norms that read the residual stream, where all blocks have the same ones."""
    of_block: dict[str, set[str]] = {}
    for path in norms:
        of_block.setdefault(_block(path), set()).add(_name(path))
    kinds = {frozenset(names) for names in of_block.values()}
    before = _NORMS.get(kinds.pop()) if len(kinds) == 1 else None
    pre_attn, pre_mlp = before or (None, None)
    return {"pre_attn": pre_attn, "pre_mlp": pre_mlp}


def _role(path: str) -> str:
    """`attn`, `mlp`, `none` or `unknown`."""
    *above, name = path[len(_block(path)) :].split(".")
    above = [part for part in above if not part.isdigit()]
    if _NO_ROLE & {*above, name} or any(part.endswith("_lora") for part in above):
        return "none"
    held_by = ".".join(above)
    attending = "att" in held_by
    if _IN_MLP.fullmatch(name) and not attending:
        return "mlp"
    if _ATTN.search(held_by):
        return "attn"
    return "mlp" if _MLP.search(held_by) else "unknown"


def _block(path: str) -> str:
    """The part of `path` up to the number of its block."""
    found = re.match(r".*?\.\d+\.", path)
    return found.group() if found else ""


def _in_other_blocks(paths: list[str], taken: set[str]) -> list[str]:
    reached = {_block(path) for path in taken}
    names = {_name(path) for path in paths if _block(path) not in reached}
    return [path for path in paths if _name(path) in names]


def _chosen(paths: list[str], kind: re.Pattern[str]) -> list[str]:
    return [path for path in paths if kind.fullmatch(_name(path))]


def _by_count(paths: list[str]) -> list[str]:
    """The paths, those whose last name is in most blocks first."""
    counts = Counter(map(_name, paths))
    return sorted(paths, key=lambda path: -counts[_name(path)])


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _names(chosen: list[str], paths: list[str]) -> tuple[str, ...]:
    """Last parts of the chosen paths that name these and no others."""
    allowed = set(chosen)
    names: dict[str, None] = {}
    for path in chosen:
        parts = path.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[-count:])
            if all(other in allowed for other in paths if other == name or other.endswith("." + name)):
                names[name] = None
                break
    return tuple(names)
