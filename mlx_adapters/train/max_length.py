"""The max length of a run whose user chose none: its rows whole, as far as model and memory go.

How long rows may be for the machine's memory is arithmetic, so that it takes no time and is the same every
time. `plan` measures; this estimates from the layers' widths what a step keeps for its backward pass:

    bytes = weights + 4 trained + b (kept)
    kept = 3/4 rows tokens (inputs and outputs of all linear layers) + (blocks + 8) scores

with b bytes per number. The scores of a block's attention are kept, as far as `models/attention.py` does not
compute them in parts (twice where they are capped), and its backward pass takes up to eight more of their
size. With gradient checkpointing only one hidden state per block is kept, and one block at a time.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_adapters import device
from mlx_adapters.adapter.call import before_text
from mlx_adapters.adapter.reading import META
from mlx_adapters.data import long_rows
from mlx_adapters.data.batches import rows_per_pass
from mlx_adapters.data.long_rows import Fitted
from mlx_adapters.data.picked import lengths_of
from mlx_adapters.data.sources import Rows
from mlx_adapters.data.tokens import Encoded
from mlx_adapters.errors import ConfigError, counted
from mlx_adapters.files.documents import from_json
from mlx_adapters.models.attention import kept_scores
from mlx_adapters.models.blocks import layer_index
from mlx_adapters.models.limits import made_for, positions
from mlx_adapters.models.load import LanguageModel
from mlx_adapters.train import checkpoint
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.distributed import Processes
from mlx_adapters.train.length import in_parts
from mlx_adapters.train.loop import CHECKPOINTS
from mlx_adapters.train.optimizers import COPIES

__all__ = ["PACKED", "estimate", "fitted", "settled", "within_memory"]

PACKED = 512  # tokens of a packed row at least: fewer hold too few examples to be worth it
_BEFORE = 256  # what it was for all rows before it followed them: memory is never the reason for less
_STEP = 128  # where memory decides, a multiple of it
_SHARE = 0.75  # of the machine's memory
_PROCESS = 500 << 20  # bytes of Python and the libraries
_KEPT, _SCORES = 0.75, 8  # see above
_UNKNOWN_HEADS = 32


def settled(
    config: TrainConfig,
    encoded: Encoded,
    model: LanguageModel,
    *,
    earlier: Path | None = None,
    processes: Processes | None = None,
    memory: int | None = None,
) -> tuple[TrainConfig, list[str]]:
    """The settings with a max length, and the reason for it as a sentence, none where the user chose it.

    Args:
        config: the settings of the run.
        encoded: its rows, whole.
        model: with the adapter on it.
        earlier: the folder of a run that is resumed, whose max length is kept.
        processes: those of the run. The first one decides.
        memory: bytes of the machine; by default of this one.
    """
    if config.max_length is not None:
        return config, []
    processes = processes or Processes()
    before = _earlier_length(earlier) if earlier and processes.writes else None
    if before is not None:
        tokens, reason = before, "that of the run that is resumed"
    else:
        tokens, reason = _chosen(config, encoded, model, processes.size, memory)
    tokens = int(processes.from_first(mx.array(tokens, dtype=mx.int32)).item())
    return replace(config, max_length=tokens), [f"max length {tokens}: {reason}"]


def fitted(rows: Rows, whole: Encoded, model: LanguageModel, config: TrainConfig) -> Fitted:
    """The whole examples of the rows, none longer than the max length in `config`, which must have one."""
    if config.max_length is None:
        raise ConfigError("the max length is not settled")
    own = {"form": rows.format, "origin": rows.origin, "tokenizer": model.tokenizer}
    return long_rows.fitted(whole, config.max_length, config.long_rows, **own)


def _chosen(
    config: TrainConfig, encoded: Encoded, model: LanguageModel, processes: int, memory: int | None
) -> tuple[int, str]:
    rows = counted(len(encoded.examples), "row")
    needed, reason = max(2, encoded.longest), f"the longest of {rows}"
    if config.packing and needed < PACKED:
        needed, reason = PACKED, f"packed; the longest of {rows} has {encoded.longest}"
    table, made = positions(model.model), made_for(model.config)
    limits = [table - before_text(model.model)] if table else []
    if (limit := min([*limits, *([made] if made else [])], default=needed)) < needed:
        needed, reason = max(2, limit), "the longest that the model was made for"
    if needed > _BEFORE:
        most = within_memory(model, config, needed, processes=processes, memory=memory)
        if most < needed:
            needed = max(_BEFORE, most)
            parts = device.on_cpu() or config.batch_size == 1  # rows are computed one by one then
            reason = "memory" if parts else f"memory for batches of {config.batch_size}"
    if cut := int((lengths_of(encoded.examples) > needed).sum()):
        reason += f"; {cut} of {rows} are longer: --long-rows says what becomes of them"
        if reason.startswith("memory"):
            smaller = [] if config.gradient_checkpointing else ["--gradient-checkpointing"]
            smaller += [] if parts else ["a smaller --batch-size"]
            reason += f", {' or '.join(smaller)} leaves room for more" if smaller else ""
    return needed, reason


def _earlier_length(output: Path) -> int | None:
    """The max length of the run in `output`, in tokens; None where it has no checkpoint."""
    folder = output / CHECKPOINTS
    if checkpoint.latest(folder) is None:
        return None
    saved: Any = checkpoint.setting(folder, "max_length")
    if not isinstance(saved, int):  # earlier versions say it where the adapter is saved, if at all
        try:
            record = from_json((output / META).read_text(encoding="utf-8"))["training"]
            saved = record.get("max_length", record.get("cutoff"))
        except Exception:  # whatever a file that is missing or damaged raises
            saved = None
    return saved if isinstance(saved, int) else _BEFORE


def within_memory(
    model: LanguageModel,
    config: TrainConfig,
    longest: int,
    *,
    processes: int = 1,
    memory: int | None = None,
) -> int:
    """The longest rows, of at most `longest` tokens, whose training is estimated to fit into three quarters
    of `memory` bytes, by default the machine's. Everything on the way to `longest` is a multiple of 128."""
    room = int(_SHARE * (device.total_memory() if memory is None else memory)) // device.sharing()
    if estimate(model, config, longest, processes=processes) <= room:
        return longest
    low, high = 0, longest // _STEP
    while low < high:
        middle = (low + high + 1) // 2
        fits = estimate(model, config, middle * _STEP, processes=processes) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * _STEP


def estimate(model: LanguageModel, config: TrainConfig, tokens: int, *, processes: int = 1) -> int:
    """Bytes that training takes at most with rows of so many tokens, those of Python and libraries included.

    Args:
        model: with the adapter on it.
        config: batch size, gradient checkpointing.
        tokens: of each row.
        processes: that share every batch.
    """
    network = model.model
    rows = config.batch_size
    if in_parts(config):
        rows = min(rows, rows_per_pass(rows * processes, tokens, processes) // processes)
    widths, hidden = _widths(network, model.config)
    heads = _field(model.config, "num_attention_heads", "n_head", "n_heads") or _UNKNOWN_HEADS
    scores = kept_scores(network, rows * heads * tokens**2) * (2 if _capped(model.config) else 1)
    blocks = [_KEPT * rows * tokens * width + scores for width in widths]
    kept = sum(blocks) + _SCORES * scores
    if config.gradient_checkpointing:
        again = rows * tokens * len(blocks) * hidden + 2 * max(blocks, default=0) + _SCORES * scores
        kept = min(kept, again)
    trained = device.tree_bytes(network.trainable_parameters())
    width = 4 if device.on_cpu() else 2
    weights = (
        device.tree_bytes(network.parameters()) + (COPIES - 1) * trained
    )  # the trained arrays are among them
    return _PROCESS + weights + int(kept * width)


def _widths(network: nn.Module, config: dict[str, Any]) -> tuple[list[int], int]:
    """(numbers per token that the linear layers of each block read and write, the width between blocks)."""
    active = _field(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk") or 1
    found: dict[int, int] = {}
    hidden = 0
    for path, module in network.named_modules():
        block, weight = layer_index(f"{path}."), module.get("weight")
        if block is None or weight is None or weight.ndim < 2:
            continue
        packed = module.get("scales")
        inputs = weight.shape[-1] if packed is None else packed.shape[-1] * getattr(module, "group_size", 32)
        experts = active if weight.ndim == 3 else 1
        found[block] = found.get(block, 0) + experts * (inputs + weight.shape[-2])
        hidden = hidden or inputs
    return list(found.values()), hidden


def _field(config: dict[str, Any], *names: str) -> int | None:
    """The first of these fields that the configuration, or that of its text model, states."""
    for fields in (config, config.get("text_config") or {}):
        for name in names:
            if isinstance(value := fields.get(name), int) and value > 0:
                return value
    return None


def _capped(config: dict[str, Any]) -> bool:
    """Whether attention scores go through a tanh, whose result is kept too."""
    return any(f.get("attn_logit_softcapping") for f in (config, config.get("text_config") or {}))
