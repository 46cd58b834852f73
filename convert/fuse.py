"""Fuse an adapter into its base: a checkpoint that needs no adapter library.

A quantized base is written out first and the adapter added in float32: the update of a fine-tuning is smaller
than the rounding of four bits, and adding it to rounded weights that are rounded again loses it. Quantizing
the fused model anew is possible, and then the report says what that changed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_adapters import adapter
from mlx_adapters.convert.against_torch import (
    auto_class,
    bound,
    logits,
    max_diff,
    quiet_transformers,
    require,
)
from mlx_adapters.convert.card import fused_card
from mlx_adapters.convert.checkpoint import (
    check_options,
    copy_tokenizer,
    refuse_links,
    refuse_not_finite,
    write_ends,
    write_mlx,
)
from mlx_adapters.convert.to_transformers import CHECKED, dequantized_weights, write_transformers
from mlx_adapters.errors import ConfigError, UnsupportedError, counted, unknown
from mlx_adapters.files import weights, writing
from mlx_adapters.models import load as models
from mlx_adapters.models.origin import remember, remembered, with_record
from mlx_adapters.models.own_template import ChatTemplate
from mlx_adapters.models.sites import is_head
from mlx_adapters.models.unread import left_out
from mlx_adapters.units import size

__all__ = ["TARGETS", "Fused", "fuse"]

TARGETS = ("transformers", "mlx")
_PROMPTS = ("Tom has 3 apples and buys 4 more.", "The capital of France is", "Below is an instruction")


@dataclass(frozen=True, kw_only=True)
class Fused:
    """What was written. On a few prompts, in logits: `effect` is the largest change by the adapter,
    `error` the largest difference of the fused model from base and adapter apart, `error_rms` its mean.
    `torch_diff` is the largest difference between transformers and MLX on the files written, None where
    transformers was not asked; it must not exceed `bound`, 1e-5 + 1e-5 * max|logit|."""

    path: Path
    bytes: int
    dtype: str
    layers: int
    effect: float
    error: float
    error_rms: float
    torch_diff: float | None
    bound: float

    @property
    def passed(self) -> bool:
        """Whether transformers, if it was asked, computes the same function."""
        return self.torch_diff is None or self.torch_diff <= self.bound

    def __str__(self) -> str:
        text = (
            f"{self.path}: {counted(self.layers, 'layer')} fused, {self.dtype}, {size(self.bytes)}\n"
            f"logits on three prompts: the adapter moves them by up to {self.effect:.2g}, fusing by up to "
            f"{self.error:.2g} (rms {self.error_rms:.2g})"
        )
        if self.torch_diff is None:
            return text
        return (
            f"{text}\nverify: no missing and no unexpected key; max |logit difference| {self.torch_diff:.1e} "
            f"in transformers (bound {self.bound:.1e}): {'passed' if self.passed else 'FAILED'}"
        )


def fuse(
    source: str | Path,
    folder: Path,
    dst: Path,
    *,
    to: str = "transformers",
    dtype: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    verify: bool = False,
) -> Fused:
    """Merge the adapter in `folder` into the model `source`, and write the result to `dst`.

    `to` transformers gives a full-precision Hugging Face checkpoint, `to` mlx an MLX folder, quantized with
    `bits`. `dtype` is the base's by default, float32 where it was quantized. `verify` opens the checkpoint
    with transformers; where its names were never checked (`CHECKED`) that is done anyway, and `dst` is not
    written unless they are right. Raises ConfigError for an adapter that is no change of weights,
    UnsupportedError for a model that cannot be written, OutputError when `dst` is not empty.
    """
    quantize = _check_request(to, dtype, bits, group_size, mode, verify)
    loaded = models.load(source, dtype="float32")
    refuse_links(loaded.path)
    adapter.refuse_links(folder := adapter.located(folder))
    model_type = loaded.config["model_type"]
    unchecked = to == "transformers" and model_type not in CHECKED
    if unchecked:
        require(why=f"a {model_type} checkpoint must be checked with transformers")
    elif verify:
        require(why="--verify asks it")
    prompts = [loaded.tokenizer.encode(text) for text in _PROMPTS]
    meta, plain, apart = _load_adapter(loaded, folder, prompts)
    layers = _merge(loaded.model, meta.method.NAME)
    card, loaded = _handed_on(loaded, meta)
    kept = dtype or ("float32" if loaded.config.get("quantization") else _precision(loaded.path))
    with writing.writing(dst) as place:
        (place / "README.md").write_text(card, encoding="utf-8")
        sums = _write(loaded, place, dst, kept, to, (bits, group_size, mode) if quantize else None)
        _write_template(place, meta.chat, loaded.path)
        del loaded
        again = _opened(place)
        if sums is not None:
            _must_read_back(again, sums, kept, model_type)
        fused = logits(again, prompts)
        del again
        torch_diff = _torch_diff(place, prompts, fused, model_type) if unchecked or verify else None
        if unchecked and torch_diff is not None and torch_diff > bound(fused):
            raise UnsupportedError(_unknown_names(model_type, f"logits differ by {torch_diff:.2g}"))
    difference = np.concatenate([(a - b).ravel() for a, b in zip(fused, apart, strict=True)])
    return Fused(
        path=dst,
        bytes=writing.folder_bytes(dst),
        dtype=kept,
        layers=layers,
        effect=max_diff(apart, plain),
        error=float(np.abs(difference).max()),
        error_rms=float(np.sqrt(np.square(difference).mean())),
        torch_diff=torch_diff,
        bound=bound(fused),
    )


def _check_request(
    to: str, dtype: str | None, bits: int | None, group_size: int | None, mode: str, verify: bool
) -> bool:
    """Whether to quantize."""
    if to not in TARGETS:
        raise ConfigError(unknown("target", to, TARGETS))
    quantize = check_options(bits, group_size, mode, None, dtype)
    if quantize and to != "mlx":
        raise ConfigError("a Hugging Face checkpoint is not quantized: leave --bits out, or give --to mlx")
    if verify and to != "transformers":
        raise ConfigError(
            "--verify opens the result with transformers: leave it out, or give --to transformers"
        )
    return quantize


def _load_adapter(
    loaded: models.LanguageModel, folder: Path, prompts: list[list[int]]
) -> tuple[adapter.AdapterMeta, list[np.ndarray], list[np.ndarray]]:
    """Load the adapter onto the model; returns its meta data and the logits without it and with it."""
    loaded.model.eval()
    plain = logits(loaded.model, prompts)
    meta = adapter.load(loaded, folder)
    loaded.model.eval()
    return meta, plain, logits(loaded.model, prompts)


def _write(
    loaded: models.LanguageModel,
    place: Path,
    dst: Path,
    dtype: str,
    to: str,
    quantization: tuple[int | None, int | None, str] | None,
) -> dict[str, tuple[Any, ...]] | None:
    """Write the model and its tokenizer to `place`, on the disk of `dst`; returns what `_must_read_back`
    compares, None for an MLX folder."""
    if to == "mlx":
        write_mlx(loaded, place, dst=dst, dtype=dtype, quantize=quantization)
        refuse_not_finite(place, str(dst), dtype)
        return None
    writing.require_space(dst, adapter.count(loaded.model)[1] * models.DTYPES[dtype].size)
    write_transformers(loaded.model, loaded.config, place, dtype=dtype, beside=_towers(loaded))
    refuse_not_finite(place, str(dst), dtype)
    copy_tokenizer(loaded.path, place)
    write_ends(place, loaded.path)
    return dict(_sums(loaded.model, dtype))


def _towers(loaded: models.LanguageModel) -> dict[str, mx.array]:
    """What the base's folder holds beside the language model, which transformers' model needs to be whole."""
    if "text_config" not in loaded.config:
        return {}
    names = set(left_out(loaded.model))
    found = weights.read_weights(loaded.path) if names else {}
    names = {name for name in names if not is_head(name.rpartition(".")[0])}  # a tied one is not asked
    return {name: array for name, array in found.items() if name in names}


def _write_template(place: Path, chat: ChatTemplate, source: Path) -> None:
    """Put the adapter's own chat template in the place of the base's, and name the end of its turns."""
    if chat.text:
        chat.store(place)
        write_ends(place, source)


def _handed_on(loaded: models.LanguageModel, meta: adapter.AdapterMeta) -> tuple[str, models.LanguageModel]:
    """(card, the model with a config that remembers how it is prompted).

    It does not remember the hub id of its base: it is another model now.
    """
    about = remembered(loaded.config)
    template = meta.template or about.get("template", "")
    chat = replace(meta.chat, stops={}) if meta.template else loaded.chat
    # the text is the tokenizer's own in the new folder
    card = fused_card(meta.method.NAME, about.get("source"), template, replace(chat, text=""))
    config = with_record(remember(loaded.config, template=template), "chat", chat.record() or None)
    return card, replace(loaded, config=config)


def _merge(model: Any, method: str) -> int:
    """Put plain layers in the place of the adapter's; returns their number."""
    merged = []
    for path, layer in adapter.layers(model).items():
        try:
            merged.append((path, layer.merge()))
        except ConfigError as error:
            raise ConfigError(
                f"{method} cannot be fused: at {path}, {error}. To hand it on: mlx-adapters export"
            ) from None
    model.update_modules(tree_unflatten(merged))
    adapter.forget(model)
    return len(merged)


def _precision(folder: Path) -> str:
    """The type that most of a folder's weights have."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    sizes: dict[str, int] = {}
    for file in weights.weight_files(folder):
        for entry in weights.header(file).values():
            if kind := names.get(entry["dtype"]):
                sizes[kind] = sizes.get(kind, 0) + entry["data_offsets"][1] - entry["data_offsets"][0]
    return max(sizes, key=lambda kind: sizes[kind], default="float32")


def _opened(folder: Path) -> Any:
    model = models.load(folder, dtype="float32").model
    model.eval()
    return model


# Whether the checkpoint is the model -----------------------------------------------------------------------


def _sums(model: Any, dtype: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The shape of each weight and a sum over the bits it is written in, by place: the same only if it came
    back as it was."""
    for name, array in dequantized_weights(model).items():
        bits = array.astype(models.DTYPES[dtype]).astype(mx.float32).view(mx.uint32).flatten()
        places = mx.arange(1, bits.size + 1, dtype=mx.uint32)
        yield name, (*array.shape, (bits * places).sum(stream=mx.cpu).item())


def _must_read_back(model: Any, sums: dict[str, tuple[Any, ...]], dtype: str, model_type: str) -> None:
    """UnsupportedError where mlx-lm reads other weights than were written: it changes them when it loads."""
    again = dict(_sums(model, dtype))
    odd = [name for name, _ in tree_flatten(model.parameters()) if again[name] != sums.get(name)]
    if odd:
        raise UnsupportedError(_unknown_names(model_type, f"{odd[0]} is read back as another tensor"))


def _torch_diff(folder: Path, prompts: list[list[int]], fused: list[np.ndarray], model_type: str) -> float:
    import torch

    with quiet_transformers(), torch.no_grad():
        try:
            network, loading = auto_class(folder).from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:  # whatever transformers raises for a model it does not know
            reason = " ".join(str(error).split())[:200]
            raise UnsupportedError(_unknown_names(model_type, f"transformers says: {reason}")) from None
        strange = [f"{what.split('_')[0]} {name}" for what in _KEYS for name in loading[what]]
        if strange:
            raise UnsupportedError(_unknown_names(model_type, f"transformers finds {strange[0]}"))
        theirs = [network.eval()(torch.tensor([ids])).logits[0].numpy() for ids in prompts]
    return max_diff(theirs, fused)


_KEYS = ("missing_keys", "unexpected_keys")


def _unknown_names(model_type: str, why: str) -> str:
    return (
        f"how a {model_type} checkpoint is written for transformers is not known here ({why}). "
        "Fuse --to mlx, or hand on the adapter: mlx-adapters export"
    )
