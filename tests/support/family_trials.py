"""What is claimed of a family, each claim a function that fails where it does not hold.

An error of ours (AdaptersError) is a refusal: the user is told. Any other exception is a fault, and a logit
that differs is the worst of them. `CLAIMS` has them by name.
"""

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from adapted import bound, change
from families import TEXT, in_float64, make_family, opened
from trials import without_step

from mlx_adapters import adapter, methods
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.adapter.call import call_model, start_cache
from mlx_adapters.convert import exchange
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.fuse import fuse
from mlx_adapters.convert.load_adapter import load_adapter
from mlx_adapters.generate.decode import generate_ids
from mlx_adapters.generate.likelihood import loglikelihoods
from mlx_adapters.models import load as models

__all__ = ["CLAIMS", "Family"]

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 12.0, "targets": "all-linear"},
    "dora": {"rank": 3, "alpha": 6.0, "targets": "all-linear"},
    "series": {"bottleneck_size": 4},
    "prefix": {"num_virtual_tokens": 3},
    "ln_tuning": {},
}
_RAGGED = [TEXT[0][:9], TEXT[1][:4], TEXT[1]]
"""Prompts of several lengths, which a batch pads."""
_NEW = 4  # tokens that are generated


@dataclass(frozen=True)
class Family:
    """A tiny model of a family in the folder `path`, as transformers saved it."""

    path: Path

    @classmethod
    def make(cls, name: str, folder: Path) -> "Family":
        """Write the family `name` of the table into `folder`."""
        return cls(make_family(name, folder))

    @cached_property
    def logits(self) -> np.ndarray:
        """What transformers computes of the texts."""
        return in_torch(opened(self.path))


def in_torch(network: Any, texts: list[list[int]] = TEXT) -> np.ndarray:
    """The logits of a model of torch, of the texts alone where virtual tokens stand before them."""
    with torch.no_grad():
        made: np.ndarray = network(torch.tensor(texts)).logits.numpy()
    return made[:, -len(texts[0]) :]


def in_mlx(network: Any) -> np.ndarray:
    """The logits of a model of ours with what it carries."""
    network.eval()
    return np.array(call_model(network, mx.array(TEXT)).astype(mx.float32))


def equals(network: Any, ours: np.ndarray, what: str) -> None:
    """AssertionError where a model of torch computes something else; what is more than rounding usually is
    must be torch's own: float64 tells how far its float32 is away."""
    theirs = in_torch(network)
    if np.abs(theirs - ours).max() <= bound(theirs):
        return
    exact = in_torch(in_float64(network))
    error, rounding = np.abs(ours - exact).max(), np.abs(theirs - exact).max()
    assert error <= bound(theirs) + 2 * rounding, (
        f"{what}: logits differ by {np.abs(theirs - ours).max():.1e}, from float64 by {error:.1e}, where "
        f"torch's own differ by {rounding:.1e} (bound {bound(theirs):.1e})"
    )


def equal(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    """AssertionError where logits are further apart than float32 computations of one function."""
    error, allowed = float(np.abs(found - expected).max()), bound(expected)
    assert error <= allowed, f"{what}: logits differ by {error:.1e} (bound {allowed:.1e})"


# Claims ----------------------------------------------------------------------------------------------------


def whole(family: Family) -> None:
    """The texts at once."""
    equal(in_mlx(models.load(family.path).model), family.logits, "whole texts")


def cached(family: Family) -> None:
    """Some tokens at once, then one by one, with the cache that generation has."""
    from mlx_lm.models.cache import make_prompt_cache

    network = models.load(family.path).model
    ids = mx.array(TEXT)
    cache = start_cache(network, len(TEXT)) or make_prompt_cache(network)
    parts = mx.split(ids, [3, *range(4, ids.shape[1])], axis=1)
    made = [call_model(network, part, cache=cache).astype(mx.float32) for part in parts]
    equal(np.array(mx.concatenate(made, axis=1)), family.logits, "token by token")


def batched(family: Family) -> None:
    """Likelihoods and greedy answers of prompts of several lengths, in one batch, are those of torch."""
    loaded = models.load(family.path)
    network = opened(family.path)
    scores = dict(loglikelihoods(loaded.model, [(row, [row]) for row in _RAGGED], batch_size=len(_RAGGED)))
    answers = dict(
        generate_ids(loaded.model, _RAGGED, stop=frozenset(), max_tokens=_NEW, batch_size=len(_RAGGED))
    )
    for number, row in enumerate(_RAGGED):
        twice = torch.tensor([row + row])
        with torch.no_grad():
            likely = network(twice).logits[0].double().log_softmax(-1)
        expected = sum(likely[len(row) + at - 1, token].item() for at, token in enumerate(row))
        found = scores[number][0]
        assert abs(found - expected) <= 1e-4 * abs(expected), f"likelihood: {found:.5f}, {expected:.5f}"
        assert answers[number] == _greedy(network, row), "greedy answers differ"


def lora(family: Family) -> None:
    """LoRA on all linear layers: PEFT opens it and computes the same, and it comes back."""
    _in_peft(family, "lora")


def dora(family: Family) -> None:
    """DoRA on all linear layers: a step of training, PEFT opens it, and it comes back."""
    _in_peft(family, "dora")


def ln_tuning(family: Family) -> None:
    """Norms that train: a step of training, PEFT opens them, and they come back."""
    _in_peft(family, "ln_tuning")


def prefix(family: Family) -> None:
    """Prefix tuning: a step of training, PEFT opens it, and it comes back."""
    _in_peft(family, "prefix")


def series(family: Family) -> None:
    """Bottleneck adapters: a step of training, and torch computes the same with our file."""
    _in_peft(family, "series")


def four_bits(family: Family) -> None:
    """A base of 4 bits trains a LoRA by a step whose loss is that of the text read in pieces."""
    with tempfile.TemporaryDirectory() as folder:
        convert(family.path, Path(folder) / "4-bit", bits=4, group_size=32)
        loaded = models.load(Path(folder) / "4-bit")
        adapter.attach(loaded, methods.make("lora", METHODS["lora"]))
        change(loaded.model)
        _trains(loaded.model)


def fused(family: Family) -> None:
    """A fused checkpoint opens in transformers with every name found, and computes the same."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = _adapted(family, "lora", folder / "a")
        fuse(family.path, folder / "a", folder / "f")
        network, said = opened(folder / "f", told=True)
        assert not said["missing_keys"], said["missing_keys"]
        assert not said["unexpected_keys"], said["unexpected_keys"]
        equals(network, expected, "the fused model in transformers")


def converted(family: Family) -> None:
    """The config.json that convert writes is the same model to transformers, and is read again alike."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "c"
        convert(family.path, folder)
        equal(in_mlx(models.load(folder).model), family.logits, "converted")
        network, config = opened(family.path), AutoConfig.from_pretrained(folder)
        if not isinstance(config, type(network.config)):
            config = config.get_text_config()
        if hasattr(network.config, "vision_config"):  # left out: there are no weights for it
            config.vision_config = network.config.vision_config
        again = type(network)._from_config(config, dtype=torch.float32, attn_implementation="eager")
        again.load_state_dict(network.state_dict())
        equal(in_torch(again.eval()), family.logits, "the written config.json in transformers")


CLAIMS: dict[str, Callable[[Family], None]] = {
    claim.__name__: claim
    for claim in (
        *(whole, cached, batched, converted, lora, four_bits, fused),
        *(dora, series, prefix, ln_tuning),
    )
}
"""{name: the claim}: each raises AssertionError where it does not hold, an AdaptersError where refused."""


# Their parts -----------------------------------------------------------------------------------------------


def _adapted(family: Family, method: str, folder: Path) -> np.ndarray:
    """Save an adapter of random values to `folder`; returns its logits, which are not the base's."""
    loaded = models.load(family.path)
    plain = in_mlx(loaded.model)
    base, config = models.describe(loaded), methods.make(method, METHODS[method])
    mx.random.seed(3)
    adapter.attach(loaded, config)
    change(loaded.model)
    made = in_mlx(loaded.model)
    assert np.abs(made - plain).max() > 1e-2, "the adapter does nothing"
    if method != "lora":
        _trains(loaded.model)
    adapter.save(loaded.model, folder, meta=AdapterMeta(method=config, base=base, template="plain"))
    if method != "lora":  # the step has changed it
        loaded = models.load(family.path)
        adapter.load(loaded, folder)
        made = in_mlx(loaded.model)
    return made


def _trains(network: Any) -> None:
    why_not = without_step(network)
    assert why_not is None, why_not


def _in_peft(family: Family, method: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = _adapted(family, method, folder / "a")
        exchange.export(folder / "a", folder / "p", format="peft", base=str(family.path))
        equals(_opened_with(family, folder / "p", method), expected, f"{method} in torch")
        loaded = models.load(family.path)
        exchange.import_adapter(folder / "p", folder / "b", loaded=loaded)
        equal(in_mlx(loaded.model), expected, f"{method} imported")


def _opened_with(family: Family, folder: Path, method: str) -> Any:
    if not methods.find(method).IN_PEFT:
        return load_adapter(opened(family.path), folder)
    import peft
    from safetensors.torch import load_file

    with warnings.catch_warnings():
        # of norms and tied embeddings; what is missing or left over is asked below
        warnings.simplefilter("ignore")
        network = peft.PeftModel.from_pretrained(opened(family.path), folder).eval()
        said = peft.set_peft_model_state_dict(network, load_file(folder / "adapter_model.safetensors"))
    if method in ("lora", "dora"):
        assert not said.unexpected_keys, f"left over in PEFT: {said.unexpected_keys[:3]}"
        idle = [n for n, array in network.named_parameters() if ".lora_B." in n and not array.any()]
        assert not idle, f"PEFT has {len(idle)} layers that the file has not: {idle[:3]}"
    return network


def _greedy(network: Any, ids: list[int]) -> list[int]:
    text = list(ids)
    for _ in range(_NEW):
        with torch.no_grad():
            text.append(int(network(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(ids) :]
