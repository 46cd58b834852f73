"""What works with what, found by trying it on a tiny model of each architecture.

No list says what is supported: every method is placed and takes a step of training, and the model must read
a text the same at once, token by token, and in a batch with others. So the table cannot be wrong about a
method, a model file or a version of mlx-lm that came later.
"""

import math
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from samples import IDS, architectures, file_of, sample

from mlx_adapters import adapter, device, methods
from mlx_adapters.adapter.call import apart, call_model, start_cache
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import AdaptersError
from mlx_adapters.generate.decode import generate_ids
from mlx_adapters.generate.likelihood import loglikelihoods
from mlx_adapters.methods.base import LINEARS
from mlx_adapters.methods.lora import LoRA
from mlx_adapters.models.discover import architecture_of
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run

__all__ = [
    "architectures",
    "attached",
    "fault",
    "stands_on",
    "support",
    "targets",
    "trial",
    "without_step",
]

_LENGTHS = (IDS.shape[1], 5)  # tokens of the two rows of the step: the second is padded


def support(model_type: str) -> dict[str, str | None]:
    """For each method, why it does not work on `model_type`; None where it does.

    Raises UnsupportedError where no model of that architecture can be built or run here, with the reason.
    Draws from MLX's global random state, and sets it.
    """
    reason = fault(model_type)
    return {name: reason or trial(model_type, name) for name in methods.names()}


def fault(model_type: str) -> str | None:
    """Why no answer of a `model_type` can be trusted, whatever the method; None if it can."""
    network = sample(model_type)
    try:
        error = apart(_in_pieces(network, IDS), call_model(network, IDS))
        if not error <= device.rounding(mx.float32):
            return (
                f"mlx-lm's {file_of(model_type)} reads a text otherwise at once than token by token (logits "
                f"differ by {error:.0e})"
            )
        return None if _batches(network) else "a padded batch gives other answers than its rows alone"
    except Exception as error:
        return _plain(error)


def trial(model_type: str, method: str) -> str | None:
    """Why `method`, with its default fields, does not work on `model_type`; None if it does."""
    try:
        network = attached(model_type, method)
        _change(network)
        return without_step(network)
    except Exception as error:
        return _plain(error)


def _plain(error: Exception) -> str:
    """What the user would see: one of mlx or of a model file may be of any kind."""
    if isinstance(error, AdaptersError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def attached(model_type: str, method: str) -> nn.Module:
    """A tiny `model_type` that carries a fresh adapter of `method` with its default fields."""
    network = sample(model_type)
    with tempfile.TemporaryDirectory() as folder:
        config = methods.find(method).trial(lambda: _trained(model_type, Path(folder)))
        adapter.attach(network, config)
    return network


def stands_on(method: str) -> str:
    """What the method's layers take the place of, as found on a tiny llama."""
    layers = adapter.layers(attached("llama", method)).values()
    bases = [layer.get("base") for layer in layers]
    kinds: dict[str, tuple[type, ...]] = {
        "linear layers": LINEARS,
        "the embedding": (nn.Embedding, nn.QuantizedEmbedding),
        "norms": (nn.RMSNorm, nn.LayerNorm),
        "the cache": (type(None),),
    }
    return next((kind for kind, types in kinds.items() if all(isinstance(b, types) for b in bases)), "blocks")


def targets(model_type: str) -> dict[str, list[str]]:
    """The default targets of the methods on linear layers, as last parts of paths."""
    row = architecture_of(sample(model_type), model_type)
    return {kind: list(getattr(row, kind)) for kind in ("lora", "series", "parallel", "ia3")}


def _trained(model_type: str, folder: Path) -> list[Path]:
    """Folders of two LoRA adapters of random weights, for a method that is made of others."""
    folders = {folder / f"rank-{rank}": rank for rank in (2, 3)}
    for member, rank in folders.items():
        network = sample(model_type)
        adapter.attach(network, LoRA(rank=rank))
        _change(network)
        adapter.save(network, member)
    return list(folders)


def _change(network: nn.Module) -> None:
    """Move the adapter away from its start, where some of its arrays have no gradient yet."""
    network.update(
        tree_map(lambda array: array + 0.05 * mx.random.normal(array.shape), network.trainable_parameters()),
        strict=False,
    )


def without_step(network: nn.Module) -> str | None:
    """Take a step of training with the adapter on `network`: why it is not the one to take, if it is not."""
    rows: list[list[int]] = IDS.tolist()  # type: ignore[assignment]
    expected = _loss(_in_pieces(network, IDS))
    before = dict(tree_flatten(network.trainable_parameters()))
    examples = [Example(row[:length], 1) for row, length in zip(rows, _LENGTHS)]
    config = TrainConfig(steps=1, batch_size=len(examples), warmup=0, lr=1e-2)
    (step,) = Run(network, examples, config=config)
    if not math.isclose(step.loss, expected, rel_tol=device.rounding(mx.float32)):
        return f"the loss of its first step is {step.loss:.4f}; read as for an answer it is {expected:.4f}"
    after = tree_flatten(network.trainable_parameters())
    lost = [name for name, array in after if mx.array_equal(array, before[name])]
    return f"no gradient reaches {len(lost)} of {len(before)} arrays, e.g. {lost[0]}" if lost else None


def _batches(network: nn.Module) -> bool:
    """Whether prompts of several lengths give the same answers and likelihoods together as alone."""
    rows: list[list[int]] = IDS.tolist()  # type: ignore[assignment]
    prompts = [rows[0], rows[1][:3], rows[1][:1]]
    answers: list[list[list[int]]] = []
    scores: list[list[float]] = []
    for size in (1, len(prompts)):
        found = dict(generate_ids(network, prompts, stop=frozenset(), max_tokens=3, batch_size=size))
        answers.append([found[index] for index in range(len(prompts))])
        likely = dict(loglikelihoods(network, [(row, [row]) for row in prompts], batch_size=size))
        scores.append([likely[index][0] for index in range(len(prompts))])
    return answers[0] == answers[1] and np.allclose(scores[0], scores[1], rtol=device.rounding(mx.float32))


def _in_pieces(network: nn.Module, ids: mx.array) -> mx.array:
    """The logits of texts that are read as generation does: some tokens at once, the others one by one."""
    cache = start_cache(network, ids.shape[0]) or make_prompt_cache(network)
    ends = [4, *range(5, ids.shape[1])]
    return mx.concatenate(
        [call_model(network, part, cache=cache) for part in mx.split(ids, ends, axis=1)], axis=1
    )


def _loss(logits: mx.array) -> float:
    """The mean over the targets of both rows."""
    losses = nn.losses.cross_entropy(logits[:, :-1].astype(mx.float32), IDS[:, 1:])
    parts = [row[: length - 1] for row, length in zip(losses, _LENGTHS)]
    return float(mx.concatenate(parts).mean())
