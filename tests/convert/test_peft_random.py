"""LoRA as PEFT makes it, in all its combinations: imported with the same logits, or refused in one line."""

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import TEXT, in_float64, make_family, opened
from peft_random import drawn, made

from mlx_adapters import adapter
from mlx_adapters.convert.against_torch import bound, logits, max_diff
from mlx_adapters.errors import AdaptersError
from mlx_adapters.models import load as models

pytest.importorskip("peft")
FAMILIES = ("llama", "qwen3_5", "gemma3", "gpt_oss", "granitemoehybrid")
SAMPLE, ALL = 3, 40


# by default one whose names are the same in PyTorch, and one whose names are measured
CHOSEN = [
    pytest.param(name, marks=() if name in ("llama", "qwen3_5") else pytest.mark.slow) for name in FAMILIES
]


@pytest.fixture(scope="module", params=CHOSEN)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_family(request.param, tmp_path_factory.mktemp("random"))
    try:
        loaded = models.load(folder, dtype="float32")
    except AdaptersError as error:
        pytest.skip(f"its base is refused: {error}"[:200])
    return loaded, opened(folder)


def in_torch(network: Any) -> list[np.ndarray]:
    with torch.no_grad():
        return [network(torch.tensor([ids])).logits[0].numpy() for ids in TEXT]


def outcome(loaded: Any, network: Any, fields: dict[str, Any], seed: int, place: Path) -> str | None:
    """`equal`, the line of a refusal, or None where PEFT makes no such adapter. Fails for a silent
    difference."""
    adapted = made(copy.deepcopy(network), fields, place, seed)
    if adapted is None:
        return None
    try:
        theirs = in_torch(adapted)
    except ValueError:  # PEFT makes it and cannot compute it: tokens of an embedding that is saved whole
        return None
    exact = in_torch(in_float64(adapted))
    try:
        adapter.load(loaded, place)
    except AdaptersError as error:
        return str(error)
    loaded.model.eval()
    ours = logits(loaded.model, TEXT)
    adapter.detach(loaded)
    # float32 in PyTorch is as far from float64, and a large update makes that more
    apart, rounding = max_diff(ours, theirs), max_diff(theirs, exact)
    assert apart <= bound(theirs) + 4 * rounding, f"{apart:.2g} apart, {rounding:.2g} by rounding: {fields}"
    return "equal"


def outcomes(family: Any, count: int, place: Path) -> list[str]:
    loaded, network = family
    rng = random.Random(loaded.config["model_type"])
    found: list[str] = []
    for seed in range(20 * count):
        if (said := outcome(loaded, network, drawn(rng, network), seed, place / str(seed))) is not None:
            assert "\n" not in said, said
            found.append(said)
        if len(found) == count:
            return found
    raise AssertionError(f"PEFT made {len(found)} of {count}")


def test_a_few_random_adapters_are_equal_or_refused(family: Any, tmp_path: Path) -> None:
    assert "equal" in outcomes(family, SAMPLE, tmp_path)


@pytest.mark.slow
def test_so_are_forty(family: Any, tmp_path: Path) -> None:
    found = outcomes(family, ALL, tmp_path)
    assert found.count("equal") > ALL / 2, sorted(set(found))
