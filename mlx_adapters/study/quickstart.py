"""The quickstart's experiment: LoRA on generated word problems, measured before and after."""

from functools import partial
from pathlib import Path
from typing import Any

from mlx_adapters.data import wordproblems
from mlx_adapters.data.sources import Rows
from mlx_adapters.evaluate import tasks
from mlx_adapters.evaluate.ask import Asking, answer
from mlx_adapters.evaluate.run import Part
from mlx_adapters.methods import LoRA
from mlx_adapters.models.load import LanguageModel
from mlx_adapters.train.trainer import Trainer

__all__ = ["TEST_ITEMS", "measurement", "training"]

TEST_ITEMS = 100
_TRAIN_ROWS, _TEST_SEED = 2000, 1
# The answers are one short line of working; the base model rambles, and gets room to reach its answer.
_MAX_TOKENS = 64
_METHOD = LoRA(rank=8, alpha=16.0, targets="all-linear")


def measurement(loaded: LanguageModel, *, seed: int, seen: frozenset[str] = frozenset()) -> Part:
    """The test problems, of which no training row has the numbers."""
    task = tasks.find("wordproblems")
    items = tasks.load_items(task, limit=TEST_ITEMS, seed=seed + _TEST_SEED)
    asking = Asking(template="alpaca", max_tokens=_MAX_TOKENS, seen=seen)
    return Part(task, items, asking, partial(answer, loaded.model, loaded.tokenizer))


def training(loaded: LanguageModel, output: Path, *, steps: int, seed: int) -> Trainer:
    """A prepared training of `steps` steps of eight rows."""
    rows = Rows(wordproblems.generate(_TRAIN_ROWS, seed=seed), "instruction", "generated word problems")
    settings: dict[str, Any] = {"steps": steps, "lr": 2e-3, "template": "alpaca", "seed": seed}
    return Trainer(loaded, rows, _METHOD, output=output, validation=16, validate_every=steps, **settings)
