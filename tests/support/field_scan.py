"""The table of configuration fields that the wheel ships, made by changing every field in both libraries.

python tests/support/field_scan.py --write [NAME ...]   scans all models (or these), and writes the table
python tests/support/field_scan.py NAME ...             prints every change that is not right
"""

import argparse
import contextlib
import itertools
import json
import os
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import tiny
from families import FAMILIES, WRAPPERS, in_float64, leave_out_towers
from field_table import Seen, as_text, entry, merged
from field_values import Case, cases

import mlx_adapters  # noqa: F401  (a fast BLAS before MLX)
from mlx_adapters.errors import UnsupportedError, one_line
from mlx_adapters.models import build, corrections, fields
from mlx_adapters.models import config as model_config

__all__ = ["Base", "bases", "changes", "outcome", "scan"]

Fields = dict[str, Any]
LENGTH = 32
_PIECES = (0, 19, 31, 32)  # where the text is cut for the cache
_ROUNDING = (
    10  # bounds: recurrences round by up to 4; the smallest of true differences, GELU's two forms, is 16
)
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Base:
    """A configuration that is changed. `place` is its part about text, None for the whole; `seen` and `moved`
    keep what others refer to: what was seen, and transformers' logits."""

    model_type: str
    fields: Fields
    place: str | None
    seen: dict[str, Seen] = field(default_factory=dict)
    moved: dict[str, np.ndarray] = field(default_factory=dict)

    def config(self, change: Fields) -> Any:
        from transformers import AutoConfig

        values = deepcopy(self.fields)
        part = values if self.place is None else values[self.place]
        part |= _IDS | deepcopy(change)
        return AutoConfig.for_model(self.model_type, **values)

    def written(self, change: Fields) -> Fields:
        """The config.json of a changed configuration."""
        written: Fields = json.loads(self.config(change).to_json_string())
        return written


@cache
def _text(vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(4, min(vocabulary, tiny.VOCAB), (2, LENGTH))


def bases() -> dict[str, list[Base]]:
    """{model_type: the configurations that are changed}."""
    found: dict[str, list[Base]] = {}
    for table, place in ((FAMILIES, None), (WRAPPERS, "text_config")):
        for name, values in table.items():
            model_type = name.partition(":")[0]
            found.setdefault(model_type, []).append(Base(model_type, values, place))
    return {name: [Base(name, values, None)] for name, values in tiny._FIELDS.items()} | found


# transformers ----------------------------------------------------------------------------------------------


@cache
def _noise(name: str, shape: tuple[int, ...]) -> Any:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * 0.15


def _model(config: Any) -> Any:
    """transformers' model of a configuration, whose tensors depend on their names and shapes alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    wrapper = "vision_config" in config.sub_configs or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    kind = AutoModelForImageTextToText if wrapper else AutoModelForCausalLM
    torch.manual_seed(0)
    model = kind.from_config(config, attn_implementation="eager").eval()
    filled = set()
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point() or tensor.data_ptr() in filled:
                continue
            filled.add(tensor.data_ptr())
            starts = tensor.ndim < 2 or name.endswith(("A_log", ".D", "dt_bias"))
            noise = _noise(name, tuple(tensor.shape))
            tensor.copy_(tensor + noise if starts else noise)
    return model


def _their_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        found: np.ndarray = model(torch.tensor(ids), use_cache=False).logits.float().numpy()
    if not np.isfinite(found).all():
        raise ValueError("the logits are not finite")
    return found


# Here ------------------------------------------------------------------------------------------------------


def _our_logits(folder: Path, drop: str | None, ids: np.ndarray, cached: bool) -> list[np.ndarray]:
    """Logits of what transformers wrote: in one piece and, if `cached`, in three through the cache."""
    from mlx_lm.models.cache import make_prompt_cache

    config = json.loads((folder / "config.json").read_text())
    if drop is not None:
        for part in (config, config.get("text_config") or {}):
            part.pop(drop, None)
    config = model_config.normalise(config)
    weights: Any = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= mx.load(str(file))
    model: Any = build.build(config, weights, "here")
    x = mx.array(ids)
    found = [model(x)]
    if cached:
        cache_ = make_prompt_cache(model)
        pieces = itertools.pairwise(_PIECES)
        found.append(mx.concatenate([model(x[:, a:b], cache=cache_) for a, b in pieces], axis=1))
    mx.eval(found)
    return [np.array(logits) for logits in found]


@contextlib.contextmanager
def _unrefused() -> Iterator[None]:
    """Without what the table decides: what would be computed without it is measured."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(fields, "check"))
        stack.enter_context(mock.patch.object(fields, "defaults", return_value={}))
        stack.enter_context(mock.patch.object(model_config, "_refuse"))
        stack.enter_context(mock.patch.object(corrections, "_refuse_lost_biases"))
        stack.enter_context(mock.patch.object(build, "refuse_unread", return_value=()))
        yield


# A scan ----------------------------------------------------------------------------------------------------


def _bound(logits: np.ndarray) -> float:
    return 1e-5 + 1e-5 * float(np.abs(logits).max())


def _far(left: np.ndarray, right: np.ndarray) -> float:
    """How far `left` is from `right`, in bounds of rounding."""
    return float(np.abs(left - right).max()) / _bound(right) if left.shape == right.shape else float("inf")


def _see(base: Base, case: Case) -> Seen:
    """What one change does."""
    try:
        config = base.config(case.fields)
        model = _model(config)
        ids = _text(config.get_text_config().vocab_size)
        theirs = _their_logits(model, ids)
    except Exception as error:  # whatever transformers makes of a value that does not go with the others
        return Seen(case, "invalid", note=one_line(error)[:200])
    base.moved.setdefault(f"{case.label} {case.value}", theirs)
    reference = base.moved.get(case.reference or "base ")
    moves = reference is None or _far(theirs, reference) > _ROUNDING
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        try:
            model.save_pretrained(folder)
            ours = _our_logits(Path(folder), case.drop, ids, moves)
        except UnsupportedError as error:
            return Seen(case, "refused", moves, str(error)[:200])
        except Exception as error:  # a field must not end the scan
            return Seen(case, "error", moves, f"{type(error).__name__}: {one_line(error)}"[:200])
    far = [_far(one, theirs) for one in ours]
    if max(far) <= _ROUNDING:
        return Seen(case, "right", moves)
    # float32 may be all of it: norms without an epsilon amplify what two libraries, or two runs, round
    # differently, and float64 tells how far torch is away from itself
    if max(far) <= _ROUNDING + 4 * _far(_their_logits(in_float64(model), ids), theirs):
        return Seen(case, "right", moves)
    return Seen(case, "wrong", moves, f"{max(far):.1f} bounds{', cached' if far[0] <= _ROUNDING else ''}")


def _scan_base(base: Base, ropes: bool = True) -> list[Seen]:
    """What the base does, and if that is right every change of it; those of the ropes only if asked."""
    first = _see(base, Case("base", "", {}))
    if first.outcome != "right":
        return [first]
    chosen = [case for case in changes(base) if ropes or "." not in case.label]
    return [first, *(one for case in chosen if (one := _see_next(base, case)))]


def _see_next(base: Base, case: Case) -> Seen | None:
    """What a change does; None where what it refers to is not right, or fails already."""
    about = base.seen.get(case.reference) if case.reference else None
    if about is not None and about.outcome != "right":
        return None
    one = _see(base, case)
    base.seen[f"{case.label} {case.value}"] = one
    return one


def _repaired(base: Base) -> Base | None:
    """A base that is one change away from `base`, and right."""
    plain = tiny._FIELDS.get(base.model_type)
    others = [] if plain is None else [plain, plain | {"num_hidden_layers": 6}]
    for values in others:
        if _see(Base(base.model_type, values, None), Case("base", "", {})).outcome == "right":
            return Base(base.model_type, values, None)
    for case in changes(base):
        if case.drop is None and _see(base, case).outcome == "right":
            values = deepcopy(base.fields)
            part = values if base.place is None else values[base.place]
            part |= case.fields
            return Base(base.model_type, values, base.place)
    return None


def changes(base: Base) -> list[Case]:
    """Every change of `base`."""
    try:
        text = base.config({}).get_text_config()
    except Exception:  # transformers refuses the base
        return []
    return list(cases(text, _arguments(text.model_type)))


def _arguments(model_type: str) -> Any:
    try:
        return model_config._plain_classes({"model_type": model_type})[1]
    except UnsupportedError:  # the text of a wrapper, whose file in mlx-lm has another name
        return object


def outcome(base: Base) -> str:
    """What the base itself does here, where nothing is refused."""
    with _unrefused():
        return _see(base, Case("base", "", {})).outcome


def scan(model_type: str) -> list[list[Seen]]:
    """What every change does to every base configuration of `model_type`; the first is the base itself."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    leave_out_towers()
    with _unrefused(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: list[list[Seen]] = []
        for base in bases()[model_type]:
            found.append(_scan_base(base, ropes=not any(seen[0].outcome == "right" for seen in found)))
        if not any(seen[0].outcome in ("right", "refused") for seen in found):
            better = _repaired(bases()[model_type][0])
            found += [_scan_base(better)] if better else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--write", action="store_true", help=f"write {fields.TABLE.name}")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for name in arguments.names or bases():
        start = time.perf_counter()
        seen = scan(name)
        found[name] = entry(seen)
        count = sum(map(len, seen))
        print(f"{name}: {count} changes in {time.perf_counter() - start:.0f} s", flush=True)
        for one in (one for each in seen for one in each if one.outcome != "right"):
            print(f"  {one}")
        if arguments.write:
            fields.table.cache_clear()  # another process may write it, too
            fields.TABLE.write_text(as_text(merged(fields.table(), found)), encoding="utf-8")


if __name__ == "__main__":
    main()
