"""The form of a row: what may be known of an architecture.

Methods, loss, packing, configuration and conversion ask a row, and never compare a `model_type` themselves.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["AdapterHub", "Architecture", "Config", "Experts", "PeftGaps"]

Config = dict[str, Any]
"""A `config.json` as read: its fields are the checkpoint's, so their types are not known here."""


@dataclass(frozen=True)
class Experts:
    """Experts that mlx-lm stacks at `path` in a block, and transformers 5 at `there`.

    `gate`, `up` and `down` are the checkpoint's names of one expert's matrices. `interleaved`: rows of gate
    and up take turns in PyTorch's one matrix of both, instead of up's following gate's. `router` is its path
    in mlx-lm's block and in PyTorch's, where they differ. Experts that are not `gated` have no gate matrix.
    """

    path: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    there: str = "mlp.experts"
    interleaved: bool = False
    router: tuple[str, str] | None = None
    gated: bool = True


@dataclass(frozen=True, kw_only=True)
class AdapterHub:
    """Where the library `adapters` finds things in a transformers model, by names below the base model.

    `known` models it finds its way in by itself, and no adapter_interface.json is written. `residual` is what
    the library gives an adapter on the MLP as residual stream: what enters the norm before the MLP; that with
    attention's output added (GPT-J, whose attention it applies first); or nothing (Phi, where it finds none).
    """

    embeddings: str = "embed_tokens"
    layers: str = "layers"
    attention: str = "self_attn"
    fused: str | None = None
    out: str = "o_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    pre_attention: str = "input_layernorm"
    pre_mlp: str | None = "post_attention_layernorm"
    known: bool = False
    residual: Literal["before the norm", "with attention", "none"] = "before the norm"


@dataclass(frozen=True, kw_only=True)
class PeftGaps:
    """What PEFT 0.21 does not open on transformers 5.24 (`test_peft_opens.py` opens what is exported).

    `absent` is a regular expression of layers that transformers lacks, or has under another name. `routed`:
    experts are chosen by a module of transformers' own, whose weight plain LoRA adapts as a parameter.
    `stacked`: PEFT takes the usual names of experts for the stacked ones, which plain LoRA alone adapts.
    `state_space`: PEFT refuses low-rank updates of the layer out of it, which fused kernels pass by.
    """

    absent: str = "(?!)"
    routed: bool = False
    stacked: bool = False
    state_space: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What is known of an architecture. The defaults are those of a model file of mlx-lm without a row."""

    # Layers, by the last parts of their paths; without `attn` all of them are discovered from the module tree
    attn: tuple[str, ...] = ()
    """All linear layers of a block's attention, or of what mixes tokens in its place."""
    mlp: tuple[str, ...] = ()
    """All linear layers of a block's MLP. The default targets of the series adapter in its AdapterH form."""
    lora: tuple[str, ...] = ()
    """Default targets of LoRA and its kin (LLM-Adapters, https://arxiv.org/abs/2304.01933)."""
    parallel: tuple[str, ...] = ()
    """Default targets of the parallel adapter."""
    ia3: tuple[str, ...] = ()
    """Default targets of (IA)3."""
    attn_out: str = ""
    """The last linear layer of attention: what it returns is added to the residual stream."""
    mlp_out: str = ""
    """The same of the MLP."""
    other_outs: tuple[str, ...] = ()
    """Further such layers, where blocks differ (hybrids)."""
    pre_attn: str | None = None
    """The norm that reads the residual stream for attention; None where there is none."""
    pre_mlp: str | None = None
    """The norm that reads it for the MLP; None also where one norm serves both."""

    # Names in the Hugging Face checkpoint
    rename: tuple[tuple[str, str], ...] = ()
    """(MLX prefix, Hugging Face prefix) of module paths; the first that fits is used."""
    experts: Experts | None = None
    """Stacked experts whose names in the checkpoint are known."""
    conv1d: bool = False
    """The checkpoint's linear layers are transposed, which PEFT must be told."""
    rename_weights: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """Renames a checkpoint's tensors into what mlx-lm's model file expects."""
    fold_weights: Callable[[dict[str, Any], Config], dict[str, Any]] | None = None
    """Changes a checkpoint's tensors by what the configuration says and mlx-lm does not fold into them."""
    kept: tuple[tuple[str, str], ...] = ()
    """(regular expression, MLX name) of the checkpoint's tensors that mlx-lm drops and a correction needs."""
    checked: bool = False
    """The tests compare a checkpoint written for transformers: with the one that transformers wrote, tensor
    by tensor, or opened by transformers, with every name found and the same logits."""

    # Differences in the function
    scaled_embedding: bool = False
    """mlx-lm scales embeddings by sqrt(width) behind the embedding layer, transformers inside it."""
    shifted_norms: bool = False
    """mlx-lm keeps the norms' weights one larger than the checkpoint: no file of norms fits both."""

    # Configuration
    own: bool = False
    """The model file is `mlx_adapters/models/MODEL_TYPE.py`; mlx-lm has none."""
    file: str | None = None
    """The model file of mlx-lm that serves the language model of a wrapper when it was saved alone."""
    forms: tuple[Callable[[Config], Config], ...] = ()
    """Give what the model file reads from a configuration as transformers saves it (`models.saved_forms`)."""
    variants: tuple[tuple[str, str], ...] = ()
    """(field, architecture): where the configuration sets the field, the model is of that architecture, whose
    checkpoints have this one's `model_type`."""
    called: str = ""
    """The `model_type` of its checkpoints, where that is another architecture's."""
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """{name in some checkpoints: the name that the model file reads}."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """transformers' values of fields that old configurations leave out and mlx-lm fills in otherwise."""
    rotary_part: float | None = None
    """transformers' default of partial_rotary_factor, where it is not the whole head."""
    rotary_names: tuple[str, str] | None = None
    """Older names of (rope_theta, partial_rotary_factor) that mlx-lm's model file reads."""
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """Fields that the model file fixes, with the values it is right for; None stands for "absent". Only for
    a model_type that `models.fields` has not compared with transformers."""
    scales_full_only: bool = False
    """Layers with a window rotate by the same base without any scaling, as the configuration says too."""
    refuse: Callable[[Config], None] | None = None
    """Raises UnsupportedError for what else the model file would compute differently."""

    # Corrections of mlx-lm's model file (`mlx_adapters.models.corrections`)
    ungated: tuple[str, str] | None = None
    """The two linear layers of an MLP without a gate, whose width is corrected."""
    widths: tuple[str, str] | None = None
    """The configuration's fields of that MLP's width and of the model's, where mlx-lm assumes 4 to 1."""
    as_built: Callable[[Config], Config] | None = None
    """The configuration from which mlx-lm's file builds the right modules."""
    corrections: tuple[Callable[[Any, Config], None], ...] = ()
    """Change a model right after it is built."""

    # Other libraries
    adapterhub: AdapterHub | None = None
    """None where the export to AdapterHub does not cover the architecture."""
    llm_adapters: bool = False
    """LLM-Adapters' fork of PEFT knows the architecture."""
    peft: PeftGaps = PeftGaps()

    @property
    def series(self) -> tuple[str, ...]:
        """Default targets of the series adapter in its AdapterH form: every linear layer of the MLP."""
        return self.mlp

    @property
    def series_p(self) -> tuple[str, ...]:
        """Default targets of the series adapter in its AdapterP form: the MLP's last linear layer."""
        return (self.mlp_out,)

    @property
    def residual(self) -> str | None:
        """What AdapterHub gives an adapter on the MLP as residual stream (`AdapterHub.residual`)."""
        return self.adapterhub.residual if self.adapterhub else None

    def to_hf(self, path: str) -> str:
        """A path of the MLX module tree as the Hugging Face checkpoint writes it."""
        if self.experts and path.endswith("." + self.experts.path):
            return path.removesuffix(self.experts.path) + self.experts.there
        if self.experts and self.experts.router and path.endswith("." + self.experts.router[0]):
            return path.removesuffix(self.experts.router[0]) + self.experts.router[1]
        path = re.sub(r"\.switch_mlp$", ".experts", path)
        for mlx_name, hf_name in self.rename:
            if path.startswith(mlx_name):
                return hf_name + path[len(mlx_name) :]
        return path

    def from_hf(self, path: str) -> str:
        """The inverse of `to_hf`."""
        if self.experts and path.endswith("." + self.experts.there):
            return path.removesuffix(self.experts.there) + self.experts.path
        if self.experts and self.experts.router and path.endswith("." + self.experts.router[1]):
            return path.removesuffix(self.experts.router[1]) + self.experts.router[0]
        path = re.sub(r"\.experts$", ".switch_mlp", path)
        for mlx_name, hf_name in self.rename:
            if path.startswith(hf_name):
                return mlx_name + path[len(hf_name) :]
        return path
