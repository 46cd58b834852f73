"""Test sets against training data: which questions were trained on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_adapters.adapter import CONFIG, read_meta
from mlx_adapters.data.overlap import Overlap, overlap, row_text, rows_texts, seen_hashes
from mlx_adapters.data.sources import load_rows, read_rows
from mlx_adapters.errors import DataError
from mlx_adapters.evaluate import tasks

__all__ = ["cells", "overlaps", "sentences"]

Found = list[tuple[str, list[str], Overlap]]


def overlaps(train: str | Path, tests: str, *, data_dir: Path | None = None) -> Found:
    """(name, questions, overlap) of each test set with the training data.

    Args:
        train: training data as `train` takes it, or the folder of an adapter.
        tests: test files or sets, joined by commas; a file need not have answers.
        data_dir: folder with NAME/test.json; None: the hub.
    """
    if (Path(train) / CONFIG).is_file():
        known = read_meta(Path(train)).seen
        if not known:
            raise DataError(f"{train}: this adapter does not remember what it was trained on (no seen.txt)")
    else:
        known = seen_hashes(rows_texts(load_rows(str(train))))
    return [(name, texts, overlap(known, texts)) for name, texts in _questions(tests, data_dir)]


def cells(found: Found) -> tuple[list[str], list[list[str]]]:
    """(heads, lines) of a table of what `overlaps` found."""
    counts = [(name, one.total, len(one.seen), len(one.near)) for name, _, one in found]
    lines = [[name, *map(str, (n, seen, near, n - seen - near))] for name, n, seen, near in counts]
    return ["test", "items", "seen", "near (13 words in a row)", "new"], lines


def sentences(found: Found, show: int) -> Iterator[str]:
    """The first `show` of the items of each kind, and what the counts leave out."""
    for name, texts, one in found:
        for kind, indices in (("seen", one.seen), ("near", one.near)):
            for index in indices[:show]:
                yield f"{name} item {index}, {kind}: {' '.join(texts[index].split())[:200]}"
    if any(one.sampled for _, _, one in found):
        yield "The training set is large: its hashes are a sample, seen and near items may be missing."


def _questions(tests: str, data_dir: Path | None) -> Iterator[tuple[str, list[str]]]:
    for name in (part.strip() for part in tests.split(",")):
        if Path(name).is_file() and "answer" not in next(iter(read_rows(Path(name))), ("", {}))[1]:
            yield name, rows_texts(load_rows(name))
        elif name:
            for task, items in tasks.load(name, data_dir=data_dir):
                rows: list[dict[str, Any]] = [{"instruction": i.instruction, "input": i.input} for i in items]
                yield task.name, [row_text(row, "instruction") for row in rows]
