"""Rows that stay on disk become tokens on disk, once; see `data/large.py` and `data/token_cache.py`."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any, cast

from mlx_adapters import __version__
from mlx_adapters.data import token_cache
from mlx_adapters.data.large import FileRows
from mlx_adapters.data.overlap import Seen, row_text
from mlx_adapters.data.sources import Rows, line_of
from mlx_adapters.data.token_cache import FORMAT, Facts, Writer
from mlx_adapters.data.tokens import Encoded, encode
from mlx_adapters.errors import DataError, counted
from mlx_adapters.files.writing import folder_bytes
from mlx_adapters.models.chat_template import TODAY, written_at
from mlx_adapters.units import size

__all__ = ["tokenized_once"]


def tokenized_once(
    rows: Rows,
    tokenizer: Any,
    *,
    written: datetime,
    told: Callable[[int, int], None] = lambda done, rows: None,
    **options: Any,
) -> tuple[Encoded, Facts, str]:
    """The tokens of large rows from the cache, or tokenized now and put there, and a sentence on which.

    Args:
        rows: whose `rows` are `FileRows`.
        tokenizer: the model's.
        written: the time for templates that write a date.
        told: called now and then with how many rows are done, and how many there are at most.
        **options: those of `encode`: all that they say is in the key of the cache.

    Raises:
        DataError: as `encode`, and where no row is left.
        OutputError: the cache cannot be written.
    """
    stored = cast(FileRows, rows.rows)
    folder = token_cache.folder_of(_key(stored, tokenizer, written, options))
    if found := token_cache.read(folder):
        return *found, _sentence("read from {} (tokenized before)", folder, found[1])
    with token_cache.holding(folder):
        if found := token_cache.read(folder):  # by the process that was waited for
            return *found, _sentence("read from {} (tokenized by another process)", folder, found[1])
        writer = Writer(folder)
        try:
            with written_at(written):
                encoded, facts = _written(rows, tokenizer, writer, told, options)
            writer.finish(encoded, facts)
        finally:
            writer.discard()
    if (found := token_cache.read(folder)) is None:
        raise DataError(f"{folder}: was written, and cannot be read. Is its disk full or damaged?")
    taken = size(folder_bytes(folder))
    return *found, _sentence(f"written to {{}} ({taken}): the next run reads them", folder, facts)


def _written(
    rows: Rows, tokenizer: Any, writer: Writer, told: Callable[[int, int], None], options: dict[str, Any]
) -> tuple[Encoded, Facts]:
    """One pass over the rows: their tokens go to `writer`, all else that is asked about them is returned."""
    stored, found, seen = cast(FileRows, rows.rows), hashlib.sha256(), Seen()
    total, count = len(stored), 0

    def passing() -> Iterator[dict[str, Any]]:
        nonlocal count
        for row in stored:
            found.update(line_of(row))
            seen.add(row_text(row, rows.format))
            count += 1
            yield row

    passed = replace(rows, rows=passing())  # type: ignore[arg-type]
    encoded = encode(passed, tokenizer, into=writer, told=lambda done: told(done, total), **options)
    told(total, total)
    unread = tuple(sorted(stored.unread))
    return encoded, Facts(count, found.hexdigest(), seen.hashes(), unread, stored.left_out)


def _sentence(done: str, folder: Any, facts: Facts) -> str:
    return f"tokens of {counted(facts.rows, 'row')} {done.format(folder)}"


def _key(rows: FileRows, tokenizer: Any, written: datetime, options: dict[str, Any]) -> str:
    """A hash of all that the tokens follow from."""
    parts = [FORMAT, __version__, rows.key, sorted(options.items()), *_tokenizer_parts(tokenizer, written)]
    return hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()[:32]


def _tokenizer_parts(tokenizer: Any, written: datetime) -> list[Any]:
    """What tells a tokenizer from any other: as it is in memory, whatever files it came from."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    backend = getattr(inner, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(inner.get_vocab(), sort_keys=True)
    template = json.dumps(tokenizer.chat_template)
    dates = [written.strftime(asked[1]) for asked in re.findall(TODAY, template.replace('\\"', '"'))]
    settings = getattr(inner, "init_kwargs", {}).items()  # paths and objects among them say nothing
    flags = sorted((name, value) for name, value in settings if isinstance(value, bool | int))
    kinds = [type(inner).__name__, flags, getattr(inner, "special_tokens_map", {})]
    variables = [getattr(tokenizer, name, "") for name in ("chat_template_kwargs", "chat_prompt_unasked")]
    ends = sorted(map(str, getattr(tokenizer, "eos_token_ids", ())))
    return [hashlib.sha256(words.encode()).hexdigest(), template, dates, variables, *kinds, ends]
