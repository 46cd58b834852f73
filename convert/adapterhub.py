"""AdapterHub's folders (the library `adapters` 1.3): block bottlenecks, and series adapters of variant P.

    adapter_config.json      the form of the bottleneck
    adapter.safetensors      ROOT.N.{attention,output}_adapters.adapters.NAME.{adapter_down.0,adapter_up}.*
    pytorch_adapter.bin      the same tensors: the library looks for this file by default
    adapter_interface.json   where the sublayers are, for models the library does not know by itself

A series adapter on the MLP's last linear layer is their bottleneck after the MLP with biases of zero.
"""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_adapters import adapter
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.adapter.reading import sound
from mlx_adapters.convert.card import short_card
from mlx_adapters.convert.parts import Parts, assemble, need, take_apart
from mlx_adapters.convert.torch_bin_write import write_bin
from mlx_adapters.errors import AdapterError, ConfigError
from mlx_adapters.files.torch_bin import read_bin
from mlx_adapters.files.writing import writing
from mlx_adapters.methods import DoubleSeqBN, ParBN, ScaledParBN, SeqBN, Series, bottleneck
from mlx_adapters.methods.bottleneck import BlockBottleneck, LinearBottleneck
from mlx_adapters.models import sites
from mlx_adapters.models.architectures.row import AdapterHub
from mlx_adapters.models.architectures.table import ARCHITECTURES, architecture
from mlx_adapters.models.discover import architecture_of
from mlx_adapters.models.load import LanguageModel

__all__ = ["METHODS", "detect", "export", "import_adapter", "reduction_factor"]

_CONFIG, _WEIGHTS, _BIN, _INTERFACE = (
    adapter.CONFIG,
    "adapter.safetensors",
    "pytorch_adapter.bin",
    "adapter_interface.json",
)
_NAME, _VERSION = "mlx", "adapters.1.3.0"
_KEY = re.compile(r"^(.*)\.(\d+)\.(attention|output)_adapters\.adapters\.([^.]+)\.(.+)$")
METHODS = ("double_seq_bn", "seq_bn", "par_bn", "scaled_par_bn", "series")
# Settings of theirs that change the function and that our forms have at one value only.
_FIXED = {
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "adapter_residual_before_ln": False,
    "original_ln_after": True,
    "phm_layer": False,
    "inv_adapter": None,
}


def detect(folder: Path) -> bool:
    """Whether `folder` is AdapterHub's."""
    return any((folder / name).exists() for name in (_WEIGHTS, _BIN))


def export(source: Path, dst: Path, *, base: str | None = None) -> None:
    """Write our folder as AdapterHub's. AdapterError for what the library computes differently."""
    parts = take_apart(source)
    kind, interface = parts.model_type, architecture(parts.model_type).adapterhub
    covered = ", ".join(name for name, row in ARCHITECTURES.items() if row.adapterhub)
    need(interface is not None, source, f"the export to AdapterHub covers {covered}, not {kind}")
    assert interface is not None
    form = _form(parts, source)
    tensors, width, layers = _their_tensors(parts)
    size = next(iter(parts.arrays.values()))["down"].shape[0]
    form["reduction_factor"] = reduction_factor(width, size)
    depth = int(parts.meta.base.get("num_hidden_layers") or max(layers) + 1)
    form["leave_out"] = sorted(set(range(depth)) - layers)
    about = {
        "name": _NAME,
        "version": _VERSION,
        "model_type": kind,
        "model_name": (base := base or parts.meta.hub_id) or "",
        "model_class": "",
        "hidden_size": width,
        "config": form,
    }
    with writing(dst) as folder:
        (folder / "README.md").write_text(short_card(parts.meta, "AdapterHub", base), encoding="utf-8")
        (folder / _CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        mx.save_safetensors(str(folder / _WEIGHTS), tensors, metadata={"format": "pt"})
        write_bin(folder / _BIN, tensors)
        if not interface.known:
            about = {"interface": _interface(interface), "model_type": kind, "version": _VERSION}
            (folder / _INTERFACE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _interface(names: AdapterHub) -> dict[str, Any]:
    """The content of adapter_interface.json."""
    own = {f"attn_{n}_proj": None if names.fused else f"{n}_proj" for n in ("q", "k", "v")}
    if names.fused:
        own = {"attn_qkv_proj": names.fused}
    return {
        # the library's LoRA would wrap fused projections too, and changes what Phi-3's computes
        "adapter_methods": ["bottleneck"],
        "model_embeddings": names.embeddings,
        "model_layers": names.layers,
        "layer_self_attn": names.attention,
        "layer_cross_attn": None,
        **own,
        "attn_o_proj": names.out,
        "layer_intermediate_proj": names.up,
        "layer_output_proj": names.down,
        "layer_pre_self_attn": names.pre_attention,
        "layer_pre_ffn": names.pre_mlp,
    }


def reduction_factor(width: int, size: int) -> float:
    """The factor of which the library makes `size`, as int(width // factor): a hair below the exact quotient,
    which for a third of all sizes would lose one to rounding."""
    return width / size * (1 - 1e-9)


def _form(parts: Parts, source: Path) -> dict[str, Any]:
    config, method = parts.meta.method, parts.meta.method.NAME
    need(method in METHODS, source, f"AdapterHub has no counterpart of {method} that computes the same")
    assert isinstance(config, BlockBottleneck | LinearBottleneck)
    if isinstance(config, Series):
        row = architecture(parts.model_type)
        last = all(sites.matches(path, row.mlp_out) for path in parts.arrays)
        need(
            last and config.side in ("auto", "post"),
            source,
            "AdapterHub can hold series adapters on the MLP's last linear layer only: use variant P",
        )
    return {
        "architecture": None,
        "mh_adapter": method == "double_seq_bn",
        "output_adapter": True,
        "non_linearity": config.non_linearity,
        "original_ln_before": method == "seq_bn",
        "residual_before_ln": True,
        "is_parallel": method in ("par_bn", "scaled_par_bn"),
        "scaling": config.scaling,
        "dropout": config.dropout,
        "init_weights": config.init,
        "cross_adapter": False,
        **_FIXED,
    }


def _their_tensors(parts: Parts) -> tuple[dict[str, mx.array], int, set[int]]:
    """(tensors under their names, width of the model, numbers of the blocks)."""
    row, named = architecture(parts.model_type), dict[str, mx.array]()
    width, layers = 0, set[int]()
    suffixes = bottleneck.BlockLayer.TENSORS
    for path, own in parts.arrays.items():
        index = sites.layer_index(path)
        assert index is not None
        layers.add(index)
        root = row.to_hf(path).partition(f".{index}.")[0]
        place = "output" if sites.matches(path, row.mlp_out) else "attention"
        width = own["up"].shape[0]
        biases = {"down_bias": mx.zeros(own["down"].shape[0]), "up_bias": mx.zeros(width)}
        for name, array in {**biases, **own}.items():
            named[f"{root}.{index}.{place}_adapters.adapters.{_NAME}.{suffixes[name]}"] = array
    return named, width, layers


def import_adapter(source: Path, dst: Path, *, loaded: LanguageModel) -> AdapterMeta:
    """Write AdapterHub's folder as ours. AdapterError names what our forms do not compute."""
    form = _read_form(source)
    model_type = loaded.config["model_type"]
    row, ours = architecture_of(loaded.model, model_type), bottleneck.BlockLayer.TENSORS
    attributes = {suffix: name for name, suffix in ours.items()}
    ends = {"attention": row.attn_out, "output": row.mlp_out}
    present = [path for path, _ in loaded.model.named_modules()]
    arrays: dict[str, dict[str, mx.array]] = {}
    for key, array in _read_tensors(source).items():
        found = _KEY.match(key)
        need(found is not None and found[5] in attributes, source, f"{key} is not a tensor of a bottleneck")
        assert found is not None
        root = row.from_hf(f"{found[1]}.{found[2]}.")
        end = ends[found[3]]
        path = next((p for p in present if p.startswith(root) and sites.matches(p, end)), None)
        need(path is not None, source, f"{key}: {loaded.path} has no such block, this adapter is another's")
        arrays.setdefault(str(path), {})[attributes[found[5]]] = array
    try:
        method = _our_method(form, arrays, source)
    except ConfigError as error:
        raise AdapterError(f"{source / _CONFIG}: {error}") from None
    return assemble(loaded, method, arrays, dst=dst, source=source)


def _our_method(
    form: dict[str, Any], arrays: dict[str, dict[str, mx.array]], source: Path
) -> BlockBottleneck | Series:
    sizes = sorted({own["down"].shape[0] for own in arrays.values()})
    need(len(sizes) == 1, source, f"bottlenecks of the sizes {sizes}: one size for all layers is supported")
    activation = str(form.get("non_linearity", "relu")).lower()
    shared: dict[str, Any] = {
        "bottleneck_size": sizes[0],
        "non_linearity": "leaky_relu" if activation == "leakyrelu" else activation,
        "scaling": form.get("scaling", 1.0),
        "dropout": float(form.get("dropout") or 0.0),
        "init": form.get("init_weights") if form.get("init_weights") in bottleneck.INITS else "bert",
    }
    need(bool(form["output_adapter"]), source, "output_adapter=False, after attention only, is not supported")
    beside, after, reads = (
        bool(form.get(name)) for name in ("is_parallel", "mh_adapter", "original_ln_before")
    )
    need(not (beside and after), source, "mh_adapter with is_parallel, beside attention, is not supported")
    if beside:
        return ScaledParBN(**shared) if shared["scaling"] == "learned" else ParBN(**shared)
    need(not (after and reads), source, "mh_adapter with original_ln_before is not supported")
    if after:
        return DoubleSeqBN(**shared)
    if reads:
        before = form.get("residual_before_ln", True)
        need(before is True, source, f"residual_before_ln={before!r} is not supported")
        return SeqBN(**shared)
    biased = any(mx.any(own[n] != 0).item() for own in arrays.values() for n in ("down_bias", "up_bias"))
    need(not biased, source, "a bottleneck after the MLP with biases, without the residual, is not supported")
    for own in arrays.values():
        del own["down_bias"], own["up_bias"]
    return Series(**shared, variant="P")


def _read_form(source: Path) -> dict[str, Any]:
    form = adapter.read_fields(source).get("config")
    if not isinstance(form, dict) or "output_adapter" not in form:
        raise AdapterError(
            f"{source / _CONFIG}: 'config' does not describe a bottleneck; only those of AdapterHub are read"
        )
    for name, value in _FIXED.items():
        need(form.get(name, value) == value, source / _CONFIG, f"{name}={form.get(name)!r} is not supported")
    return form


def _read_tensors(source: Path) -> dict[str, mx.array]:
    if (source / _WEIGHTS).exists():
        return adapter.read_tensors(source, _WEIGHTS)
    return sound(read_bin(source / _BIN), source / _BIN)
