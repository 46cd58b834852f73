"""Rotary positions by transformers' formulas, in every model that has them.

mlx-lm's files read more or less of the fields that scale rotations, or none. So each rotary layer is asked
what angles it turns by, right after it is built, and where these are not what the configuration says, it
makes room for one of ours. The formulas are those of position interpolation (Chen et al. 2023, arXiv
2306.15595), YaRN (Peng et al. 2023, arXiv 2309.00071), LongRoPE (Ding et al. 2024, arXiv 2402.13753) and
Llama 3.1, in the conventions of transformers' `modeling_rope_utils`. Dynamic NTK scaling is refused: there a
text read in pieces is turned otherwise than at once.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_adapters.errors import CheckpointError, UnsupportedError
from mlx_adapters.models.architectures.row import Config
from mlx_adapters.models.blocks import layer_index
from mlx_adapters.models.reference import reference
from mlx_adapters.models.windows import layer_types

__all__ = ["SCALED", "correct_rotations", "original_length"]

SCALED = ("linear", "llama3", "yarn", "longrope", "proportional", "mrope")
"""The kinds of scaling that are computed here, by their names in a configuration."""

_ROUNDING = 1e-5  # relative: float32 angles differ by some 1e-6 between libraries


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """What a rotary layer does: `wavelengths` [pairs] of the angles over 2 pi, `long` the same for texts
    longer than `length` tokens where they differ, and `factor`, which multiplies what is turned (for long
    texts `long_factor`)."""

    wavelengths: tuple[float, ...]
    factor: float = 1.0
    long: tuple[float, ...] | None = None
    long_factor: float = 1.0
    length: int = 0


class ScaledRoPE(nn.Module):
    """Turns the first `dims` numbers of queries and keys [rows, heads, time, width] by a `Rotation`."""

    def __init__(self, dims: int, traditional: bool, rotation: Rotation) -> None:
        super().__init__()
        self.dims, self.traditional, self.rotation = dims, traditional, rotation
        self._short = mx.array(rotation.wavelengths)
        self._long = mx.array(rotation.long or rotation.wavelengths)

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        wavelengths, factor = self._chosen(x.shape[-2], offset)
        if not (isinstance(factor, float) and factor == 1.0):
            x = x.at[..., : self.dims].multiply(factor)
        return mx.fast.rope(
            x,
            self.dims,
            traditional=self.traditional,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=wavelengths,
        )

    def _chosen(self, time: int, offset: int | mx.array) -> tuple[mx.array, float | mx.array]:
        rotation = self.rotation
        if rotation.long is None:
            return self._short, rotation.factor
        if not isinstance(offset, mx.array):
            long = offset + time > rotation.length
            return (self._long, rotation.long_factor) if long else (self._short, rotation.factor)
        # the longest row decides for all, as in transformers; nothing waits for the device
        past = mx.max(offset) + time > rotation.length
        factor = mx.where(past, rotation.long_factor, rotation.factor)
        return mx.where(past, self._long, self._short), factor


def correct_rotations(model: Any, config: Config) -> None:
    """Give each rotary layer of `model` the rotation that transformers computes for `config`.

    Raises UnsupportedError where a scaling is asked for that cannot be computed, or of a model whose rotary
    layers are not found.
    """
    about = reference(config["model_type"])
    if about.rotation is None:
        return
    types, turning = layer_types(config), 0
    for path, holder in model.named_modules():
        index = layer_index(f"{path}.")  # that of a block itself too
        kind = types[index] if index is not None and index < len(types) else None
        for name, rope in list(holder.children().items()):
            if not isinstance(rope, nn.Module) or not _ROTARY.search(type(rope).__name__):
                continue
            measured = _measured(rope)
            if measured is None:
                continue
            turning += 1
            wanted = _wanted(config, kind, measured.dims, by_type=about.rotation == "by layer type")
            if wanted and not _alike(measured, wanted):
                setattr(holder, name, ScaledRoPE(measured.dims, measured.traditional, wanted))
    if config.get("rope_scaling") and not turning:
        scaling = config["rope_scaling"]
        raise UnsupportedError(
            f"config.json: field 'rope_scaling' is {scaling!r}, and no rotary layer was found in mlx-lm's "
            f"{config['model_type']}"
        )


def original_length(config: Config, scaling: Config) -> Any:
    """The length in tokens that a model was first trained for: Phi-3 states it outside the scaling."""
    return (
        config.get("original_max_position_embeddings")
        or scaling.get("original_max_position_embeddings")
        or config.get("max_position_embeddings")
    )


# What mlx-lm's layers do -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a rotary layer does at position 1: the `angles` of its pairs, after multiplying by `factor`.
    `traditional` layers pair neighbours, others a number with the one half the width further on."""

    dims: int
    traditional: bool
    angles: tuple[float, ...]
    factor: float


_ROTARY = re.compile(r"rope$|rotary", re.IGNORECASE)


def _measured(rope: Any) -> Measured | None:
    """What `rope` does, found out by turning unit vectors; None where it does something else."""
    dims = getattr(rope, "dims", None) or getattr(rope, "dim", None)
    dims = dims or 2 * getattr(rope, "_freqs", mx.zeros(0)).size
    try:
        units = mx.eye(dims)[None, :, None]  # a head for each
        turned = np.array(rope(units, offset=1).astype(mx.float32))[0, :, 0]
    except Exception:  # a module of another kind with such a name
        return None
    half = dims // 2
    for traditional in (False, True):
        first = np.arange(half) * 2 if traditional else np.arange(half)
        second = first + (1 if traditional else half)
        cosines, sines = turned[first, first], turned[first, second]
        factors = np.hypot(cosines, sines)
        whole = np.allclose((turned**2).sum(-1), factors[0] ** 2, 1e-5)  # nothing goes to another place
        if (
            whole
            and np.allclose(factors, factors[0], 1e-5)
            and np.allclose(turned[second, first], -sines, 1e-5)
        ):
            angles = np.arctan2(sines, cosines)
            return Measured(
                dims=dims, traditional=traditional, angles=tuple(angles.tolist()), factor=float(factors[0])
            )
    return None


def _alike(found: Measured, wanted: Rotation) -> bool:
    if wanted.long:
        return False
    angles = [1 / wavelength for wavelength in wanted.wavelengths]
    return np.allclose((*found.angles, found.factor), (*angles, wanted.factor), _ROUNDING, 1e-9)


# What transformers' formulas say ---------------------------------------------------------------------------


def _wanted(config: Config, kind: str | None, dims: int, *, by_type: bool) -> Rotation | None:
    """The rotation of a layer of type `kind`; None where the configuration does not say it."""
    stated = config.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in stated.values()):
        stated = stated.get(kind)
    elif by_type and kind != "full_attention":
        return None  # an older configuration, whose scaling is that of the full layers
    theta = (stated or {}).get("rope_theta") or (None if by_type else config.get("rope_theta"))
    theta = theta or reference(config["model_type"]).theta
    if not stated or theta is None:
        return None
    return _rotation(config, stated, float(theta), dims)


def _rotation(config: Config, stated: Config, theta: float, dims: int) -> Rotation | None:
    kind = stated.get("rope_type") or stated.get("type") or "default"
    if kind in ("default", "mrope"):
        return Rotation(wavelengths=_plain(theta, dims))
    if kind == "linear":
        return Rotation(wavelengths=tuple(w * _number(stated, "factor") for w in _plain(theta, dims)))
    if kind == "dynamic" and stated.get("alpha"):  # Hunyuan's, which does not depend on the text
        return Rotation(wavelengths=_plain(theta * _number(stated, "alpha") ** (dims / (dims - 2)), dims))
    if kind == "proportional":
        return _proportional(stated, theta, dims)
    length = _length(config, stated)
    if kind == "llama3":
        return _llama3(stated, theta, dims, length)
    if kind == "yarn":
        return _yarn(config, stated, theta, dims, length)
    if kind == "longrope":
        return _longrope(config, stated, theta, dims, length)
    raise UnsupportedError(
        f"config.json: field 'rope_scaling' is of type {kind!r}, which is not computed here. Supported: "
        f"{', '.join(SCALED)}"
    )


def _plain(theta: float, dims: int) -> tuple[float, ...]:
    return tuple(theta ** (i / dims) for i in range(0, dims, 2))


def _number(stated: Config, name: str, default: float | None = None) -> float:
    value = stated.get(name)
    value = default if value is None else value
    if not isinstance(value, (int, float)):
        raise CheckpointError(f"config.json: rope_scaling's {name} is {value!r}, and should be a number")
    return float(value)


def _length(config: Config, stated: Config) -> int:
    length = original_length(config, stated)
    if not isinstance(length, (int, float)) or length <= 0:
        raise CheckpointError(
            f"config.json: rope_scaling's original_max_position_embeddings is {length!r}, and should be a "
            "number of tokens"
        )
    return int(length)


def _proportional(stated: Config, theta: float, dims: int) -> Rotation:
    turned = int(_number(stated, "partial_rotary_factor", 1.0) * dims // 2)
    factor = _number(stated, "factor", 1.0)
    angles = (factor * theta ** (2 * i / dims) for i in range(turned))
    return Rotation(wavelengths=(*angles, *[math.inf] * (dims // 2 - turned)))


def _llama3(stated: Config, theta: float, dims: int, length: int) -> Rotation:
    factor, low = _number(stated, "factor"), _number(stated, "low_freq_factor")
    high = _number(stated, "high_freq_factor")

    def scaled(wavelength: float) -> float:
        turns = length / (2 * math.pi * wavelength)  # within the original length
        if turns > high:
            return wavelength
        if turns < low:
            return wavelength * factor
        smooth = (turns - low) / (high - low)
        return wavelength / ((1 - smooth) / factor + smooth)

    return Rotation(wavelengths=tuple(map(scaled, _plain(theta, dims))))


def _yarn(config: Config, stated: Config, theta: float, dims: int, length: int) -> Rotation:
    factor = _ratio(config, stated, length)
    low, high = (
        dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (stated.get("beta_fast") or 32, stated.get("beta_slow") or 1)
    )
    # transformers looks for it on top, whatever a type of layers says
    if (config.get("rope_parameters") or {}).get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high += 0.001 if low == high else 0

    def scaled(pair: int, wavelength: float) -> float:
        stretched = min(max((pair - low) / (high - low), 0.0), 1.0)
        return wavelength / (stretched / factor + (1 - stretched))

    wavelengths = tuple(scaled(*item) for item in enumerate(_plain(theta, dims)))
    return Rotation(wavelengths=wavelengths, factor=_yarn_attention(stated, factor))


def _yarn_attention(stated: Config, factor: float) -> float:
    if stated.get("attention_factor") is not None:
        return _number(stated, "attention_factor")

    def root(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1.0 if factor > 1 else 1.0

    once, everywhere = stated.get("mscale"), stated.get("mscale_all_dim")
    return root(once) / root(everywhere) if once and everywhere else root(1.0)


def _longrope(config: Config, stated: Config, theta: float, dims: int, length: int) -> Rotation:
    factor = _ratio(config, stated, length)
    usual = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    attention = _number(stated, "attention_factor", usual)
    short, long = (_factors(stated, name, dims) for name in ("short_factor", "long_factor"))
    plain = _plain(theta, dims)
    read = reference(config["model_type"]).mscales
    factors = [_number(stated, f"{n}_mscale", attention) if read else attention for n in ("short", "long")]
    return Rotation(
        wavelengths=tuple(w * f for w, f in zip(plain, short, strict=True)),
        factor=factors[0],
        long=tuple(w * f for w, f in zip(plain, long, strict=True)),
        long_factor=factors[1],
        length=length,
    )


def _ratio(config: Config, stated: Config, length: int) -> float:
    if stated.get("factor") is not None:
        return _number(stated, "factor")
    return _number(config, "max_position_embeddings") / length


def _factors(stated: Config, name: str, dims: int) -> list[float]:
    found = stated.get(name)
    if not isinstance(found, list) or len(found) != dims // 2 or not _numeric(found):
        raise CheckpointError(
            f"config.json: rope_scaling's {name} should be a list of {dims // 2} numbers, one for each pair "
            "that is turned"
        )
    return [float(value) for value in found]


def _numeric(values: Iterable[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)
