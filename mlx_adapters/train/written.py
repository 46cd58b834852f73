"""When the rows of a run were written, for chat templates that write a date."""

from datetime import datetime
from pathlib import Path

import mlx.core as mx

from mlx_adapters.train import checkpoint
from mlx_adapters.train.distributed import Processes

__all__ = ["written_time"]


def written_time(folder: Path, resume: bool, processes: Processes) -> datetime:
    """When the rows are written, for templates that write a date: now, or as the run that is resumed had it.
    The first process decides, for another may be past midnight. `folder` has the checkpoints."""
    saved = checkpoint.setting(folder, "written") if resume and processes.writes else None
    moment = datetime.fromisoformat(saved) if isinstance(saved, str) else datetime.now()
    parts = processes.from_first(mx.array(moment.timetuple()[:6], dtype=mx.int32)).tolist()
    year, month, day, hour, minute, second = parts
    return datetime(year, month, day, hour, minute, second)
