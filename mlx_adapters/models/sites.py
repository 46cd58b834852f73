"""Where an architecture's layers live: the table of sites.

A row names, per `model_type`, the linear layers by role, the default targets of the paper's methods
(LLM-Adapters, arXiv 2304.01933), the norms before the two sublayers, and how a path in MLX's module tree
reads in the Hugging Face checkpoint (mlx-lm renames three of them). An architecture without a row is
discovered: its linear layers are found in the tree and sorted into roles by the names of the modules that
hold them.
"""

import re
from dataclasses import dataclass, replace

import mlx.nn as nn

from mlx_adapters.errors import UnsupportedError
from mlx_adapters.models.discover import discover

__all__ = [
    "EXPERTS",
    "SHIFTED_NORMS",
    "TABLE",
    "Site",
    "Sites",
    "embedding",
    "from_hf",
    "is_embedding",
    "is_head",
    "is_position",
    "is_table",
    "layer_index",
    "linears",
    "matches",
    "side",
    "sites",
    "tied",
    "to_hf",
]


@dataclass(frozen=True, kw_only=True)
class Sites:
    """The layers of one architecture, by the last parts of their paths.

    `attn` and `mlp` are all linear layers of a block's two sublayers, `attn_out` and `mlp_out` the last of
    each: what they return is added to the residual stream; `other_outs` are further such layers, where blocks
    differ (hybrids). `pre_attn` and `pre_mlp` are the norms that read
    the residual stream for them; None where the architecture has no such norm. `lora`, `parallel` and `ia3`
    are default targets. `rename` holds (MLX prefix, Hugging Face prefix) pairs; the first that fits is used.
    `conv1d`: the checkpoint's linear layers are transposed, which PEFT wants to be told. `scaled_embedding`:
    mlx-lm scales the embeddings by sqrt(width) behind the embedding layer, transformers inside it.
    """

    attn: tuple[str, ...]
    mlp: tuple[str, ...]
    lora: tuple[str, ...]
    parallel: tuple[str, ...]
    ia3: tuple[str, ...]
    attn_out: str
    mlp_out: str
    other_outs: tuple[str, ...] = ()
    pre_attn: str | None = None
    pre_mlp: str | None = None
    rename: tuple[tuple[str, str], ...] = ()
    conv1d: bool = False
    scaled_embedding: bool = False

    @property
    def series(self) -> tuple[str, ...]:
        """Default targets of the series adapter in its AdapterH form: every linear layer of the MLP."""
        return self.mlp

    @property
    def series_p(self) -> tuple[str, ...]:
        """Default targets of the series adapter in its AdapterP form: the MLP's last linear layer."""
        return (self.mlp_out,)


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where an adapter is about to stand: `role` is `attn`, `mlp` or empty; `side` is `pre` for a layer into
    a sublayer, `post` out of it."""

    path: str
    model_type: str
    role: str
    side: str


_LLAMA = Sites(
    attn=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    lora=("q_proj", "v_proj"),
    parallel=("q_proj", "k_proj", "v_proj"),
    ia3=("k_proj", "v_proj", "down_proj"),
    attn_out="o_proj",
    mlp_out="down_proj",
    pre_attn="input_layernorm",
    pre_mlp="post_attention_layernorm",
)

_BLOOM = Sites(
    attn=("query_key_value", "self_attention.dense"),
    mlp=("dense_h_to_4h", "dense_4h_to_h"),
    lora=("query_key_value",),
    parallel=("query_key_value",),
    ia3=("query_key_value", "dense_4h_to_h"),
    attn_out="self_attention.dense",
    mlp_out="dense_4h_to_h",
    pre_attn="input_layernorm",
    pre_mlp="post_attention_layernorm",
    rename=(("model.", "transformer."),),
)

TABLE: dict[str, Sites] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"),
        _LLAMA,
    ),
    "gemma": replace(_LLAMA, scaled_embedding=True),
    **dict.fromkeys(
        ("gemma2", "gemma3_text"),
        replace(_LLAMA, pre_mlp="pre_feedforward_layernorm", scaled_embedding=True),
    ),
    "olmo2": replace(_LLAMA, pre_attn=None, pre_mlp=None),  # its norms come after the sublayers
    "phi3": replace(
        _LLAMA,
        attn=("qkv_proj", "o_proj"),
        mlp=("gate_up_proj", "down_proj"),
        lora=("qkv_proj",),
        parallel=("qkv_proj",),
        ia3=("qkv_proj", "down_proj"),
    ),
    "glm": replace(_LLAMA, mlp=("gate_up_proj", "down_proj")),
    "phi": Sites(
        attn=("q_proj", "k_proj", "v_proj", "dense"),
        mlp=("fc1", "fc2"),
        lora=("q_proj", "v_proj"),
        parallel=("q_proj", "k_proj", "v_proj"),
        ia3=("q_proj", "v_proj", "fc2"),
        attn_out="dense",
        mlp_out="fc2",
        pre_attn="input_layernorm",  # one norm serves both sublayers
    ),
    "gpt2": Sites(
        attn=("attn.c_attn", "attn.c_proj"),
        mlp=("mlp.c_fc", "mlp.c_proj"),
        lora=("c_attn",),
        parallel=("c_attn",),
        ia3=("c_attn", "mlp.c_proj"),
        attn_out="attn.c_proj",
        mlp_out="mlp.c_proj",
        pre_attn="ln_1",
        pre_mlp="ln_2",
        rename=(("model.", "transformer."),),
        conv1d=True,
    ),
    "gptj": Sites(
        attn=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("fc_in", "fc_out"),
        lora=("q_proj", "v_proj"),
        parallel=("q_proj", "k_proj", "v_proj"),
        ia3=("q_proj", "v_proj", "fc_out"),
        attn_out="out_proj",
        mlp_out="fc_out",
        pre_attn="ln_1",  # one norm serves both sublayers
        rename=(("model.", "transformer."),),
    ),
    "gpt_neox": replace(
        _BLOOM,
        attn=("query_key_value", "attention.dense"),
        attn_out="attention.dense",
        rename=(
            ("model.h.", "gpt_neox.layers."),
            ("model.embed_out", "embed_out"),
            ("model.", "gpt_neox."),
        ),
    ),
    **dict.fromkeys(("bloom", "chatglm"), _BLOOM),
    "opt": Sites(
        attn=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("fc1", "fc2"),
        lora=("q_proj", "v_proj"),
        parallel=("q_proj", "k_proj", "v_proj"),
        ia3=("q_proj", "k_proj", "fc2"),
        attn_out="out_proj",
        mlp_out="fc2",
        pre_attn="self_attn_layer_norm",
        pre_mlp="final_layer_norm",
    ),
    "gpt_neo": Sites(
        attn=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("mlp.c_fc", "mlp.c_proj"),
        lora=("q_proj", "v_proj"),
        parallel=("q_proj", "k_proj", "v_proj"),
        ia3=("q_proj", "v_proj", "c_proj"),
        attn_out="out_proj",
        mlp_out="mlp.c_proj",
        pre_attn="ln_1",
        pre_mlp="ln_2",
        rename=(("model.", "transformer."),),
    ),
}

# model_type -> where mlx-lm keeps a block's stacked experts; transformers 5 has mlp.experts in all of these
EXPERTS = {
    "mixtral": "block_sparse_moe.switch_mlp",
    "dots1": "mlp.experts",
    **dict.fromkeys(("deepseek_v2", "glm4_moe", "olmoe", "qwen2_moe", "qwen3_moe"), "mlp.switch_mlp"),
}

# Where mlx-lm keeps the norms' weights one larger than the checkpoint has them: no file of both worlds fits.
SHIFTED_NORMS = frozenset(("qwen3_5", "qwen3_5_moe", "qwen3_next", "step3p5"))

_EMBEDDINGS = (
    *("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "token_embeddings"),
    *("embeddings", "embedding", "embed"),
)
_HEADS = ("lm_head", "embed_out", "output_layer")
_POSITIONS = re.compile(r"(?:wpe|embed_positions|position_embeddings)$")
# gemma3n and kimi_k3 do not call these layers: they read their weights
_READ = re.compile(r"\.altup\.|_res_proj$")
_LAYER = re.compile(r"(?:^|\.)(?:\w*layers|h|blocks)\.(\d+)\.")


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


def sites(model_type: str, model: nn.Module) -> Sites:
    """The row of `model_type`, or one discovered from the module tree."""
    return TABLE.get(model_type) or _discover(model)


def matches(path: str, name: str) -> bool:
    """Whether `name`, a last part like `q_proj` or `mlp.c_proj`, names `path`."""
    return path == name or path.endswith("." + name)


def side(path: str, row: Sites) -> str:
    """`post` for the last linear layer of a sublayer, `pre` for the others."""
    outs = (row.attn_out, row.mlp_out, *row.other_outs)
    return "post" if any(matches(path, name) for name in outs) else "pre"


def embedding(model: nn.Module, *, alone: bool = False) -> str:
    """The path of the token embedding; UnsupportedError where there is none of a known name.

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
    """Whether `path` is called as the embedding of tokens is, or stands below an adapter in its place."""
    return any(part in _EMBEDDINGS for part in path.split(".")) and not is_position(path)


def is_position(path: str) -> bool:
    """Whether `path` is called as a table of learned positions is."""
    return bool(_POSITIONS.search(path))


def layer_index(path: str) -> int | None:
    """The number of the decoder block that `path` lies in; None outside the blocks."""
    found = _LAYER.search(path)
    return int(found.group(1)) if found else None


def to_hf(path: str, model_type: str) -> str:
    """A path of the MLX module tree as the Hugging Face checkpoint writes it."""
    if (experts := EXPERTS.get(model_type)) and path.endswith("." + experts):
        return path.removesuffix(experts) + "mlp.experts"
    row = TABLE.get(model_type)
    for mlx_name, hf_name in row.rename if row else ():
        if path.startswith(mlx_name):
            return hf_name + path[len(mlx_name) :]
    return path


def from_hf(path: str, model_type: str) -> str:
    """The inverse of `to_hf`."""
    if (experts := EXPERTS.get(model_type)) and path.endswith(".mlp.experts"):
        return path.removesuffix("mlp.experts") + experts
    row = TABLE.get(model_type)
    for mlx_name, hf_name in row.rename if row else ():
        if path.startswith(hf_name):
            return mlx_name + path[len(hf_name) :]
    return path


def _discover(model: nn.Module) -> Sites:
    norms, stacked = [], []
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind.endswith("SwitchLinear"):
            stacked.append(path)
        # hyper-connections mix several residual streams: nothing reads the one there would be
        elif (
            re.search(r"norm|connection", kind, re.IGNORECASE)
            and _LAYER.search(path)
            and path.rpartition(".")[0][-1].isdigit()
        ):
            norms.append(path)
    return Sites(**discover(list(linears(model)), norms, stacked))


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
