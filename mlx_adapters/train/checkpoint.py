"""What a run needs to continue as if it had never stopped: adapter, optimizer, position.

    checkpoints/step-000100/
        state.safetensors   adapter.* and optimizer.* arrays
        state.json          step, the settings the run must share, its progress
    checkpoints/best-000080/     the same, of the best validation

A checkpoint is written beside, synced and renamed: it is there whole or not at all. The data order follows
from (seed, epoch) and the noise of dropout from (seed, step): the step alone says where the run stands.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from mlx_adapters.errors import TrainingError, writing_to
from mlx_adapters.files.documents import from_json
from mlx_adapters.files.weights import header

__all__ = ["digest", "latest", "load_adapter", "restore", "save", "setting"]

_LENGTH = ("epochs", "steps")  # what a resumed run may change: it goes on longer
_ARRAYS, _FACTS = "state.safetensors", "state.json"


def save(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    step: int,
    settings: dict[str, Any],
    progress: dict[str, Any],
    keep: int,
    best: bool = False,
) -> Path:
    """Write the checkpoint of `step` below `folder` and delete all but the newest `keep`.

    With `best` it is that of the best validation so far, of which one is kept beside the others.
    """
    arrays = {f"adapter.{name}": array for name, array in tree_flatten(model.trainable_parameters())}
    arrays |= {f"optimizer.{name}": array for name, array in tree_flatten(optimizer.state)}
    kind = "best" if best else "step"
    target = folder / f"{kind}-{step:06d}"
    temporary = folder / f".{kind}-{step:06d}"
    facts = json.dumps({"step": step, "settings": settings, "progress": progress}, indent=2)
    if _holds(target, facts):  # Ctrl-C right after a checkpoint: replacing it could lose it
        return target
    shutil.rmtree(temporary, ignore_errors=True)
    with writing_to(target):
        temporary.mkdir(parents=True)
        mx.save_safetensors(str(temporary / _ARRAYS), arrays)
        (temporary / _FACTS).write_text(facts)
        _sync(temporary / _ARRAYS, temporary / _FACTS, temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _sync(folder)
    for old in _all(folder, kind)[: -1 if best else -keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _holds(target: Path, facts: str) -> bool:
    """Whether this very state is saved there, whole. A damaged one, or one of another run, is not."""
    try:
        header(target / _ARRAYS)
        return (target / _FACTS).read_text() == facts
    except Exception:  # whatever a file that is missing or damaged raises
        return False


def latest(folder: Path) -> Path | None:
    """The newest checkpoint below `folder`."""
    found = _all(folder)
    return found[-1] if found else None


def setting(folder: Path, name: str) -> Any:
    """A setting of the run, from the newest checkpoint that can be read; None where there is none."""
    for checkpoint in reversed(_all(folder)):
        try:
            return _read_facts(checkpoint)["settings"].get(name)
        except Exception:  # as in `restore`
            continue
    return None


def restore(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    settings: dict[str, Any],
    warn: Callable[[str], None] = lambda message: None,
) -> tuple[int, dict[str, Any]]:
    """Load the newest checkpoint that can be read, and return its step and the run's progress.

    Raises TrainingError when there is none, or when it was made with other settings or another adapter.
    """
    for checkpoint in reversed(_all(folder)):
        try:
            facts = _read_facts(checkpoint)
            step, saved, progress = int(facts["step"]), dict(facts["settings"]), dict(facts["progress"])
            if checkpoint.name != f"step-{step:06d}":
                raise ValueError(f"it says step {step}")
            arrays = _arrays(checkpoint / _ARRAYS)
        except Exception as error:  # a damaged file fails in many ways; the one before may be whole
            warn(f"{checkpoint}: cannot be read ({error}); trying the one before")
            continue
        for words in _same(saved, settings, checkpoint):
            warn(words)
        _apply(arrays, model, optimizer, checkpoint)
        return step, progress
    raise TrainingError(f"{folder}: has no readable checkpoint to resume from. Start without --resume")


def load_adapter(folder: Path, model: nn.Module, *, step: int) -> None:
    """Give `model` the adapter of the best validation, which was at `step`."""
    file = folder / f"best-{step:06d}" / _ARRAYS
    try:
        arrays = _arrays(file)
    except Exception as error:
        raise TrainingError(f"{file}: the best adapter cannot be read ({error})") from None
    found = [(k.removeprefix("adapter."), v) for k, v in arrays.items() if k.startswith("adapter.")]
    model.update(tree_unflatten(found))


def digest(model: nn.Module) -> str:
    """A hash of what trains in `model`: the same for the same bits."""
    found = hashlib.blake2b(digest_size=16)
    for name, array in tree_flatten(model.trainable_parameters()):
        found.update(name.encode())
        found.update(np.array(array.reshape(-1).view(mx.uint8)).data)
    return found.hexdigest()


def _read_facts(checkpoint: Path) -> Any:
    facts = from_json((checkpoint / _FACTS).read_text())
    if "cutoff" in facts["settings"]:  # what `max_length` was called before
        facts["settings"]["max_length"] = facts["settings"].pop("cutoff")
    return facts


def _arrays(file: Path) -> dict[str, mx.array]:
    header(file)  # MLX would make room for whatever size the header says
    arrays: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    mx.eval(arrays)
    return arrays


def _apply(arrays: dict[str, mx.array], model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> None:
    own = dict(tree_flatten(model.trainable_parameters()))
    adapter = {k.removeprefix("adapter."): v for k, v in arrays.items() if k.startswith("adapter.")}
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in adapter.items()}:
        raise TrainingError(
            f"{checkpoint}: holds another adapter than this run's. Use the same method and fields"
        )
    model.update(tree_unflatten(list(adapter.items())))
    state = [(k.removeprefix("optimizer."), v) for k, v in arrays.items() if k.startswith("optimizer.")]
    optimizer.state = tree_unflatten(state)
    mx.eval(model.trainable_parameters(), optimizer.state)


def _same(saved: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> list[str]:
    """What has changed of the run's length, in words; TrainingError where something else has."""
    changed = {k: f"{k} was {saved[k]!r}, now {v!r}" for k, v in now.items() if saved.get(k, v) != v}
    if others := [words for name, words in changed.items() if name not in _LENGTH]:
        raise TrainingError(
            f"{checkpoint}: made with other settings ({'; '.join(others)}). Use the same to resume"
        )
    return [f"{words}: from here on the rate is that of a run of this length" for words in changed.values()]


def _sync(*places: Path) -> None:
    """On disk before the rename: after a power cut a checkpoint is whole or absent."""
    for place in places:
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _all(folder: Path, kind: str = "step") -> list[Path]:
    return sorted(folder.glob(f"{kind}-*")) if folder.is_dir() else []
