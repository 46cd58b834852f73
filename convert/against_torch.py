"""What every comparison with PyTorch shares: what it needs, how close is close, and a quiet transformers."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_adapters.adapter.call import call_model
from mlx_adapters.errors import UnsupportedError

__all__ = ["auto_class", "bound", "logits", "max_diff", "quiet_transformers", "require", "require_class"]


def require(*packages: str, why: str = "--verify compares with PyTorch") -> None:
    """Raise UnsupportedError where one of torch, transformers and `packages` is not installed."""
    needed = ("torch", "transformers", *packages)
    if absent := [name for name in needed if find_spec(name) is None]:
        raise UnsupportedError(
            f"{why}, and {', '.join(absent)} is not installed. "
            f"Install it: pip install {' '.join(('torch==2.13.0', *needed[1:]))}"
        )


def logits(model: Any, prompts: list[list[int]]) -> list[np.ndarray]:
    """float32 logits [tokens, vocabulary] of each prompt, whatever adapter the model carries."""
    return [np.array(call_model(model, mx.array([ids]))[0].astype(mx.float32)) for ids in prompts]


def max_diff(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    """The largest difference between two lists of arrays."""
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


def bound(logits: list[np.ndarray]) -> float:
    """How far float32 computations of the same function may be apart: 1e-5 + 1e-5 * max|logit|."""
    return 1e-5 + 1e-5 * max(float(np.abs(array).max()) for array in logits)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and notes on its own future: the caller reports what it finds."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # PEFT says so of every LoRA on a tied embedding (merging it is refused here), and of every norm
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            warnings.filterwarnings("ignore", message="Unsupported layer type.*")
            # it looks for the patterns of stacked experts, which it follows, among the modules only
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys.*")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def require_class(model_type: str) -> None:
    """Raise UnsupportedError where transformers has no such models: then there is nothing to compare with."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"transformers has no {model_type} models of its own, so there is nothing to compare with"
        )


def auto_class(folder: Path | str) -> Any:
    """The class of transformers that opens the model in `folder`: AutoModelForCausalLM where it can."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
    return AutoModelForCausalLM if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
