"""What a run that is resumed takes over from before: decisions of its start that it must not make anew."""

from datetime import datetime
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_adapters.adapter.reading import META
from mlx_adapters.files.documents import from_json
from mlx_adapters.train import checkpoint
from mlx_adapters.train.distributed import Processes
from mlx_adapters.train.loop import CHECKPOINTS

__all__ = ["earlier_length", "time_of"]

_LENGTH = 256  # of runs that chose none, before the max length followed the rows


def time_of(output: Path, resume: bool, processes: Processes) -> datetime:
    """When the rows are written, for templates that write a date: now, or as the run that is resumed had it.
    The first process decides, for another may be past midnight."""
    saved = checkpoint.setting(output / CHECKPOINTS, "written") if resume and processes.writes else None
    moment = datetime.fromisoformat(saved) if isinstance(saved, str) else datetime.now()
    parts = processes.from_first(mx.array(moment.timetuple()[:6], dtype=mx.int32)).tolist()
    year, month, day, hour, minute, second = parts
    return datetime(year, month, day, hour, minute, second)


def earlier_length(output: Path) -> int | None:
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
    return saved if isinstance(saved, int) else _LENGTH
