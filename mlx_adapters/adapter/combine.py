"""Merge LoRA adapters, weighted, into one LoRA adapter; PEFT's `add_weighted_adapter` computes the same.

Adapter i adds s_i B_i A_i to a weight (s_i = alpha / rank) and has the weight w_i. With c_i = w_i s_i:

    cat       A = [c_1 A_1; c_2 A_2; ...],  B = [B_1, B_2, ...]       exactly sum_i c_i B_i A_i; ranks add up
    svd       B A = the best approximation of rank r to sum_i c_i B_i A_i; r is the largest rank by default
    linear    A = sum_i sign(c_i) sqrt|c_i| A_i,  B = sum_i sqrt|c_i| B_i     cheap; mixed terms B_i A_j enter
    ties      linear after trimming each factor to its largest entries and electing one sign for each entry
              (Yadav et al. 2023, https://arxiv.org/abs/2306.01708)
    dare_linear, dare_ties    the same after dropping entries at random and scaling the rest up
              (Yu et al. 2023, https://arxiv.org/abs/2311.03099)
    magnitude_prune           linear after trimming each factor to its largest entries

`ties_svd` and so on do it to the update B A instead of its factors. `density` is the share of entries that
trimming and dropping keep. The result has scale 1 (alpha = rank). One difference to PEFT: where the first
adapter is rsLoRA, PEFT leaves `use_rslora` set on the result, which makes it sqrt(rank) times too large.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_adapters import adapter
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.adapter.from_mlx_lm import refuse_mlx_lm
from mlx_adapters.adapter.located import located
from mlx_adapters.adapter.reading import PREFIX, weights_file
from mlx_adapters.errors import AdapterError, ConfigError, counted, unknown
from mlx_adapters.files.writing import refuse_existing, writing
from mlx_adapters.methods.lora import LoRA
from mlx_adapters.models import sites
from mlx_adapters.models.own_template import OWN

__all__ = ["COMBINATIONS", "Combined", "combine"]

# method -> (which entries are dropped, whether a sign is elected)
_RECIPES: dict[str, tuple[str, bool]] = {
    "linear": ("none", False),
    "ties": ("small", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
    "magnitude_prune": ("small", False),
}
COMBINATIONS = ("linear", "cat", "svd", *(name for name in _RECIPES if name != "linear")) + tuple(
    f"{name}_svd" for name in _RECIPES if name != "linear"
)


@dataclass(frozen=True)
class Combined:
    """What was written: the folder, how many layers it adapts, and the rank of the update."""

    path: Path
    layers: int
    rank: int


@dataclass(frozen=True)
class _Factors:
    """One adapter's part of one layer: scale * b @ a is its update."""

    a: mx.array
    b: mx.array
    scale: float


@dataclass(frozen=True)
class _Member:
    folder: Path
    meta: AdapterMeta
    fields: dict[str, Any]
    config: LoRA
    factors: dict[str, _Factors]


def combine(
    folders: Sequence[Path | str],
    weights: Sequence[float],
    dst: Path | str,
    *,
    method: str = "linear",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Combined:
    """Merge LoRA adapters of one base, weighted, and write one adapter folder.

    A layer that only some of them adapt is merged from those; a single adapter has nothing to be trimmed
    against and is merged linearly, but for `svd`.

    Args:
        folders: The adapter folders, or their hub ids.
        weights: A weight for each of them.
        dst: The adapter folder to write; it must not hold anything.
        method: One of COMBINATIONS; this module's docstring has their formulas.
        rank: The rank of the result, for `svd` and `*_svd`; by default the largest of the adapters' ranks.
        density: The share of entries that is kept, for the methods that drop some.
        seed: The seed of the methods that drop at random.

    Returns:
        The folder, how many layers it adapts, and its rank.

    Raises:
        ConfigError: Settings that do not fit each other.
        AdapterError: Adapters that cannot be merged.
        OutputError: `dst` holds something, or cannot be written.
    """
    _check(folders, weights, method, rank, density)
    if len(folders) == 1 and method != "svd":
        method = "linear"
    dst = Path(dst)
    refuse_existing(dst)
    members = [_member(folder) for folder in folders]
    _fit(members)
    rank = _rank(members, method, rank)
    noise = _Noise(seed)
    paths = list(dict.fromkeys(path for member in members for path in member.factors))
    arrays: dict[str, mx.array] = {}
    # factorisations exist on the CPU only, and nothing here is large enough to want another device
    with mx.stream(mx.cpu):
        for path in paths:
            parts = [
                (member.factors[path], weight)
                for member, weight in zip(members, weights, strict=True)
                if path in member.factors
            ]
            a, b = _merged(parts, method, rank, density, noise)
            arrays[f"{PREFIX}{path}.lora_A.weight"] = a
            arrays[f"{PREFIX}{path}.lora_B.weight"] = b
        mx.eval(arrays)
    with writing(dst) as place:
        _write(place, arrays, paths, members, list(weights), method, rank)
    return Combined(dst, len(paths), rank)


def _check(
    folders: Sequence[Path | str], weights: Sequence[float], method: str, rank: int | None, density: float
) -> None:
    if method not in COMBINATIONS:
        raise ConfigError(unknown("way to combine", method, COMBINATIONS))
    if not folders:
        raise ConfigError("combine: no adapter is given")
    if len(weights) != len(folders):
        found = f"{counted(len(weights), 'weight')} for {counted(len(folders), 'adapter')}"
        raise ConfigError(f"combine: {found}: give one each")
    if bad := [weight for weight in weights if not math.isfinite(weight)]:
        raise ConfigError(f"combine: weight {bad[0]} is not a finite number")
    if rank is not None and not method.endswith("svd"):
        raise ConfigError(f"combine: rank={rank} is a choice of svd only; {method} decides it itself")
    if rank is not None and rank < 1:
        raise ConfigError(f"combine: rank={rank} must be at least 1")
    if not 0 < density <= 1:
        raise ConfigError(f"combine: density={density} must be above 0 and at most 1")


def _member(source: str | Path) -> _Member:
    folder = located(source)
    adapter.refuse_links(folder)
    refuse_mlx_lm(folder)
    meta = adapter.read_meta(folder)
    config = meta.method
    if not isinstance(config, LoRA):
        raise AdapterError(f"{folder}: is a {config.NAME} adapter: only LoRA adapters can be combined")
    if meta.names:  # its tensors have the names of PyTorch, and so have the patterns in PEFT's file
        config = LoRA.from_peft(adapter.read_fields(folder))
    found: dict[str, dict[str, mx.array]] = {}
    for name, array in adapter.read_tensors(folder).items():
        path, dot, factor = name.removeprefix(PREFIX).rpartition(".lora_")
        if not dot or factor not in ("A.weight", "B.weight") or not name.startswith(PREFIX):
            raise AdapterError(f"{weights_file(folder)}: {name} is not a LoRA factor of a linear layer")
        found.setdefault(path, {})[factor] = array.astype(mx.float32)
    factors = {}
    for path, pair in found.items():
        if (
            len(pair) < 2
            or pair["A.weight"].shape[0] != config.rank
            or pair["B.weight"].shape[1] != config.rank
        ):
            raise AdapterError(
                f"{weights_file(folder)}: {path} has not both factors of rank {config.rank}, which "
                f"{adapter.CONFIG} says"
            )
        factors[path] = _Factors(pair["A.weight"], pair["B.weight"], config.at(path)[1])
    return _Member(folder, meta, adapter.read_fields(folder), config, factors)


def _fit(members: list[_Member]) -> None:
    """Raise AdapterError for adapters of different bases."""
    first = members[0]
    for other in members[1:]:
        for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
            ours, theirs = first.meta.base.get(key), other.meta.base.get(key)
            if None not in (ours, theirs) and ours != theirs:
                raise AdapterError(
                    f"{other.folder}: was trained on a base with {key} {theirs}, {first.folder} on one with "
                    f"{ours}: only adapters of the same base can be combined"
                )
        for path in first.factors.keys() & other.factors.keys():
            ours, theirs = _size(first.factors[path]), _size(other.factors[path])
            if ours != theirs:
                raise AdapterError(
                    f"{other.folder}: {path} is {theirs[1]} x {theirs[0]}, in {first.folder} {ours[1]} x "
                    f"{ours[0]}: only adapters of the same base can be combined"
                )


def _size(factors: _Factors) -> tuple[int, int]:
    return factors.a.shape[1], factors.b.shape[0]


def _rank(members: list[_Member], method: str, rank: int | None) -> int:
    """The rank of the result."""
    ranks = [member.config.rank for member in members]
    if method == "cat":
        return sum(ranks)
    if method.endswith("svd"):
        return rank or max(ranks)
    if len(set(ranks)) > 1:
        raise ConfigError(
            f"combine: {method} needs adapters of one rank, these have {', '.join(map(str, ranks))}: use cat "
            "or svd"
        )
    return ranks[0]


def _merged(
    parts: list[tuple[_Factors, float]], method: str, rank: int, density: float, noise: "_Noise"
) -> tuple[mx.array, mx.array]:
    """(A, B) of one layer."""
    scaled = [weight * part.scale for part, weight in parts]
    if method == "cat":
        a = mx.concatenate([c * part.a for c, (part, _) in zip(scaled, parts, strict=True)])
        b = mx.concatenate([part.b for part, _ in parts], axis=1)
        return _padded(a, b, rank)
    if method == "svd":
        a = mx.concatenate([c * part.a for c, (part, _) in zip(scaled, parts, strict=True)])
        return _padded(*_truncated(a, mx.concatenate([part.b for part, _ in parts], axis=1), rank), rank)
    if method.endswith("_svd"):
        updates = [part.scale * (part.b @ part.a) for part, _ in parts]
        recipe = _RECIPES[method.removesuffix("_svd")]
        update = _blend(updates, [weight for _, weight in parts], recipe, density, noise)
        return _padded(*_truncated(update, None, rank), rank)
    # the sign goes to one factor only: in both it would cancel
    into_a = [math.copysign(math.sqrt(abs(c)), c) for c in scaled]
    a = _blend([part.a for part, _ in parts], into_a, _RECIPES[method], density, noise)
    b = _blend([part.b for part, _ in parts], [abs(c) for c in into_a], _RECIPES[method], density, noise)
    return a, b


def _blend(
    tensors: list[mx.array], weights: list[float], recipe: tuple[str, bool], density: float, noise: "_Noise"
) -> mx.array:
    """The weighted sum of what `recipe` leaves of the tensors."""
    dropped, elect = recipe
    if density < 1 and dropped == "small":
        tensors = [_largest(tensor, density) for tensor in tensors]
    elif density < 1 and dropped == "random":
        tensors = [tensor * noise.keep(tensor.shape, density) / density for tensor in tensors]
    stack = mx.stack(tensors)
    weighted = stack * mx.array(weights, mx.float32).reshape(-1, *[1] * tensors[0].ndim)
    if not elect:
        return weighted.sum(axis=0)
    # the sign of the sum wins an entry; the mean is over the tensors that agree with it
    agree = mx.sign(stack) == mx.where(stack.sum(axis=0) >= 0, 1, -1)
    return (weighted * agree).sum(axis=0) / mx.maximum(agree.sum(axis=0), 1)


def _largest(tensor: mx.array, density: float) -> mx.array:
    """The tensor with all but its largest entries set to zero."""
    flat = tensor.reshape(-1)
    kept = int(density * flat.size)
    order = mx.argpartition(-mx.abs(flat), max(kept, 1) - 1)
    mask = mx.zeros(flat.size)
    mask[order[:kept]] = 1
    return (flat * mask).reshape(tensor.shape)


class _Noise:
    """Masks drawn one after the other from a seed."""

    def __init__(self, seed: int) -> None:
        self.key = mx.random.key(seed)

    def keep(self, shape: tuple[int, ...], density: float) -> mx.array:
        """1 with probability `density`, else 0."""
        self.key, now = mx.random.split(self.key)
        return mx.random.bernoulli(density, shape, key=now).astype(mx.float32)


def _truncated(a: mx.array, b: mx.array | None, rank: int) -> tuple[mx.array, mx.array]:
    """(A, B) of `rank` whose product is nearest to b @ a; without b, to a itself."""
    if b is None:
        # numpy's: MLX forms the square factors in full, which took minutes where this takes seconds
        thin = np.linalg.svd(np.array(a), full_matrices=False)
        left, values, right = (mx.array(part) for part in thin)
        rank = min(rank, values.size)
        return right[:rank], left[:, :rank] * values[:rank]
    # b a = Q_b (R_b R_a^T) Q_a^T: only the small matrix in the middle needs a decomposition
    q_b, r_b = mx.linalg.qr(b)
    q_a, r_a = mx.linalg.qr(a.T)
    left, values, right = mx.linalg.svd(r_b @ r_a.T)
    rank = min(rank, values.size)
    return right[:rank] @ q_a.T, q_b @ (left[:, :rank] * values[:rank])


def _padded(a: mx.array, b: mx.array, rank: int) -> tuple[mx.array, mx.array]:
    """With zeros up to `rank`: all layers of an adapter have the same."""
    return mx.pad(a, [(0, rank - a.shape[0]), (0, 0)]), mx.pad(b, [(0, 0), (0, rank - b.shape[1])])


def _write(
    dst: Path,
    arrays: dict[str, mx.array],
    paths: list[str],
    members: list[_Member],
    weights: list[float],
    method: str,
    rank: int,
) -> None:
    first, metas = members[0], [member.meta for member in members]
    model_type = first.meta.base.get("model_type", "")
    config = LoRA(
        rank=rank,
        alpha=float(rank),
        dropout=first.config.dropout,
        targets=",".join(sites.from_hf(path, model_type) for path in paths),
    )
    fields = {
        "peft_type": LoRA.PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": first.fields.get("base_model_name_or_path") or "",
        "inference_mode": True,
        **config.to_peft(),
        "fan_in_fan_out": first.fields.get("fan_in_fan_out", False),
        # whole paths: short names would also name layers that none of the adapters has
        "target_modules": sorted(paths),
    }
    meta = AdapterMeta(
        method=config,
        base=first.meta.base,
        template=_common(metas, lambda meta: meta.template),
        loss_on=_common(metas, lambda meta: meta.loss_on),
        chat=first.meta.chat if all(meta.chat == first.meta.chat for meta in metas) else OWN,
        seen=sorted({item for meta in metas for item in meta.seen}),
        training={"combined": [str(member.folder) for member in members], "weights": weights, "how": method},
    )
    adapter.write(dst, arrays, fields=fields, meta=meta)


def _common(metas: list[AdapterMeta], get: Callable[[AdapterMeta], str]) -> str:
    """The value that all of them share, or an empty text."""
    values = {get(meta) for meta in metas}
    return values.pop() if len(values) == 1 else ""
