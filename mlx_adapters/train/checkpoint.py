"""Checkpoints of a run: `folder/checkpoints/step-000100/`, complete or absent.

    state.safetensors  the adapter's arrays under the model's own names, and the optimizer's two moments
    state.json         the step and what identifies the run: settings that fix the data, and a digest of it
    adapter/           the adapter folder as of this step, ready for eval and export

There is no state of random numbers or of the data to store: both follow from the seed and the step.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import CheckpointError, OutputError
from mlx_adapters.train.config import TrainConfig

__all__ = ["State", "check", "identity", "newest", "optimizer_tree", "path", "read", "write"]

# A resumed run must see the same batches; the learning rate, the length and the rest may be changed.
_FIXED = ("batch_size", "accumulation", "seed")
_ARRAYS, _FIELDS = "state.safetensors", "state.json"


@dataclass(frozen=True)
class State:
    """What a checkpoint holds. `moments` maps a parameter's name to AdamW's `m` and `v`."""

    step: int
    parameters: dict[str, mx.array]
    moments: dict[str, dict[str, mx.array]]
    run: dict[str, Any]

    @classmethod
    def of(
        cls, step: int, parameters: dict[str, mx.array], optimizer: dict[str, Any], run: dict[str, Any]
    ) -> "State":
        """From an optimizer's state over the same flat names."""
        return cls(step, parameters, {name: optimizer[name] for name in parameters}, run)


def identity(config: TrainConfig, examples: Sequence[Example]) -> dict[str, Any]:
    """What must be equal for a run to be continued."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array([example.start, len(example.ids), *example.ids], dtype=np.int64).tobytes())
    return {name: getattr(config, name) for name in _FIXED} | {"data": digest.hexdigest()[:16]}


def path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / "checkpoints" / f"step-{step:06d}"


def newest(folder: Path) -> Path | None:
    """The checkpoint with the highest step, or None."""
    found = _all(folder)
    return found[-1] if found else None


def write(folder: Path, state: State, *, save: Callable[[Path], None] | None, keep: int) -> Path:
    """Write a checkpoint beside its place, move it there, then delete all but the last `keep`."""
    target = path(folder, state.step)
    temporary = target.with_name("." + target.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        mx.save_safetensors(str(temporary / _ARRAYS), _flat(state))
        fields = {"step": state.step, "run": state.run}
        (temporary / _FIELDS).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        if save is not None:
            save(temporary / "adapter")
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except (OSError, RuntimeError) as error:  # mlx reports a failed write as RuntimeError
        raise OutputError(f"{target}: the checkpoint cannot be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def read(folder: Path) -> State:
    """Read a checkpoint; CheckpointError names the file that cannot be used."""
    try:
        fields = json.loads((folder / _FIELDS).read_text(encoding="utf-8"))
        step, run = int(fields["step"]), dict(fields["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / _FIELDS}: not the state of a run ({error!r}). {_remedy(folder)}"
        ) from None
    try:
        arrays: dict[str, mx.array] = dict(mx.load(str(folder / _ARRAYS)))
        mx.eval(arrays)
    except Exception as error:  # mlx raises several types for a file that is cut or missing
        raise CheckpointError(f"{folder / _ARRAYS}: cannot be read ({error}). {_remedy(folder)}") from None
    parameters: dict[str, mx.array] = {}
    moments: dict[str, dict[str, mx.array]] = {}
    for key, array in arrays.items():
        kind, _, name = key.partition("/")
        if kind == "parameter":
            parameters[name] = array
        else:
            moments.setdefault(name, {})[kind] = array
    return State(step, parameters, moments, run)


def check(state: State, *, run: dict[str, Any], arrays: dict[str, mx.array], where: Path) -> None:
    """CheckpointError, with all differences, unless `state` belongs to this run and this adapter."""
    problems = [
        f"{name} was {state.run.get(name)} and is {value}"
        for name, value in run.items()
        if state.run.get(name) != value
    ]
    if missing := sorted(set(arrays) ^ set(state.parameters)):
        problems.append(f"{len(missing)} arrays are not in both, e.g. {missing[0]}")
    problems += [
        f"{name} has shape {list(state.parameters[name].shape)}, not {list(array.shape)}"
        for name, array in arrays.items()
        if name in state.parameters and state.parameters[name].shape != array.shape
    ][:1]
    if sorted(state.moments) != sorted(state.parameters):
        problems.append("the optimizer's arrays are incomplete")
    if problems:
        raise CheckpointError(
            f"{where}: cannot be resumed: {'; '.join(problems)}. Use the same settings, or train to another folder"
        )


def optimizer_tree(state: State) -> dict[str, Any]:
    """The state that `mlx.optimizers.AdamW` takes. AdamW counts every step, so its count is ours."""
    return {"step": mx.array(state.step, mx.uint64), "learning_rate": mx.array(0.0), **state.moments}


def _flat(state: State) -> dict[str, mx.array]:
    flat = {f"parameter/{name}": array for name, array in state.parameters.items()}
    for name, pair in state.moments.items():
        flat |= {f"{kind}/{name}": array for kind, array in pair.items()}
    return flat


def _all(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def _remedy(folder: Path) -> str:
    return f"Delete {folder} to resume from the one before"
