"""Sets larger than memory: rows that stay on disk, tokens written once, runs that come out the same."""

import gzip
import json
import threading
from collections.abc import Sequence
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_run
from small_run import losses
from spoken import make_speaker

from mlx_adapters.data import large, overlap, token_cache, tokenized
from mlx_adapters.data.batches import groups
from mlx_adapters.data.large import FileRows
from mlx_adapters.data.overlap import rows_texts, seen_hashes
from mlx_adapters.data.picked import lengths_of, pick
from mlx_adapters.data.sources import Rows, digest, load_rows
from mlx_adapters.data.token_cache import StoredExamples
from mlx_adapters.data.tokenized import tokenized_once
from mlx_adapters.data.tokens import Encoded, Example, encode
from mlx_adapters.errors import DataError, OutputError
from mlx_adapters.models import load as model
from mlx_adapters.train.trainer import Trainer

WRITTEN = datetime(2026, 1, 1)
PAIRS = [
    {"prompt": f"tom has {n % 23} apples", "completion": f"it is {n % 5} " * (1 + n % 4), "id": n}
    for n in range(60)
]
TALKS = [
    {
        "messages": [
            {"role": role, "content": f"{role} {n} {turn}"}
            for turn in range(1 + n % 3)
            for role in ("user", "assistant")
        ]
    }
    for n in range(30)
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every file is large here, and the cache is a folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MLX_ADAPTERS_CACHE", str(folder))
    monkeypatch.setattr(large, "LARGE", 1)
    return folder / "tokens"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from mlx_lm.tokenizer_utils import load

    return load(make_speaker("Qwen2.5", tmp_path_factory.mktemp("speaker")))


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> model.LanguageModel:
    return model.load(folders["llama"])


def jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    return str(small_run.jsonl(file, rows))


def in_memory(source: str, monkeypatch: pytest.MonkeyPatch) -> Rows:
    with monkeypatch.context() as patch:
        patch.setattr(large, "LARGE", 1 << 40)
        return load_rows(source)


def once(rows: Rows, tokenizer: Any, **options: Any) -> tuple[Encoded, token_cache.Facts, str]:
    return tokenized_once(rows, tokenizer, written=WRITTEN, **{"template": "chat"} | options)


KINDS = {
    "rows.jsonl": lambda file: jsonl(file, PAIRS),
    "rows.json": lambda file: file.write_text(json.dumps(PAIRS)),
    "rows.jsonl.gz": lambda file: file.write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in PAIRS).encode())
    ),
    "rows.csv": lambda file: file.write_text(
        "prompt,completion,id\n" + "".join(f'{r["prompt"]},"{r["completion"]}\n",{r["id"]}\n' for r in PAIRS)
    ),
    "rows.parquet": lambda file: _table().to_parquet(file),
    "saved": lambda file: _table().save_to_disk(str(file)),
}


def _table() -> Any:
    from datasets import Dataset

    return Dataset.from_list(PAIRS)


@pytest.mark.parametrize("name", KINDS)
def test_rows_on_disk_are_those_in_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KINDS[name](tmp_path / name)
    rows, whole = load_rows(str(tmp_path / name)), in_memory(str(tmp_path / name), monkeypatch)
    assert isinstance(rows.rows, FileRows)
    assert isinstance(whole.rows, list)
    assert (len(rows.rows), rows.format, rows.origin) == (60, whole.format, whole.origin)
    assert list(rows.rows) == list(rows.rows) == whole.rows
    assert rows.rows[:3] == whole.rows[:3]
    assert tuple(rows.rows.unread) == whole.unread == ("id",)


@pytest.mark.parametrize(
    ("made", "template"), [(PAIRS, "plain"), (PAIRS, "chat"), (TALKS, "chat")], ids=["plain", "chat", "talks"]
)
def test_tokens_on_disk_are_those_in_memory_and_made_once(
    made: list[dict[str, Any]],
    template: str,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = jsonl(tmp_path / "rows.jsonl", [*made, made[3], made[3]])
    rows, whole = load_rows(source), in_memory(source, monkeypatch)
    expected = encode(whole, tokenizer, template=template)
    first, facts, said = once(rows, tokenizer, template=template)
    assert f"tokens of {len(whole.rows)} rows written to " in said
    monkeypatch.setattr(tokenized, "encode", None)  # whoever asks again does not tokenize
    copied = jsonl(tmp_path / "copied.jsonl", [*made, made[3], made[3]])
    second, again, said = once(load_rows(copied), tokenizer, template=template)
    assert f"tokens of {len(whole.rows)} rows read from " in said
    assert said.endswith("(tokenized before)")
    for found in (first, second):
        assert isinstance(found.examples, StoredExamples)
        assert list(found.examples) == list(expected.examples)
        assert (found.repeated, found.longest, found.empty) == (
            expected.repeated,
            expected.longest,
            expected.empty,
        )
        assert lengths_of(found.examples).tolist() == [len(one.ids) for one in expected.examples]
    assert expected.repeated >= 2
    assert facts == again
    assert (facts.digest, facts.seen) == (digest(whole.rows), seen_hashes(rows_texts(whole)))
    assert facts.unread == whole.unread


def test_whatever_changes_the_tokens_changes_the_cache(tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", PAIRS)
    once(load_rows(source), tokenizer)
    kinds: list[tuple[Rows, Any, dict[str, Any]]] = [
        (load_rows(source), tokenizer, {"template": "plain"}),
        (load_rows(source), tokenizer, {"loss_on": "all"}),
        (load_rows(source, columns={"completion": "prompt", "prompt": "completion"}), tokenizer, {}),
        (load_rows(jsonl(tmp_path / "more.jsonl", [*PAIRS, PAIRS[0]])), tokenizer, {}),
    ]
    stored = load_rows(source)
    assert isinstance(stored.rows, FileRows)
    kinds.append((Rows(stored.rows.only(None, 7, ""), stored.format, source), tokenizer, {}))
    for number, (rows, own, options) in enumerate(kinds, start=2):
        once(rows, own, **options)
        assert len(list(cache.iterdir())) == number
    before = tokenizer.chat_template
    try:
        tokenizer._tokenizer.chat_template = before.replace("be kind", "be short")
        once(load_rows(source), tokenizer)
    finally:
        tokenizer._tokenizer.chat_template = before
    assert len(list(cache.iterdir())) == len(kinds) + 2


@pytest.mark.parametrize("name", [*token_cache._FILES, "facts.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_damaged_cache_is_written_anew(
    name: str, how: str, tokenizer: Any, tmp_path: Path, cache: Path
) -> None:
    rows = load_rows(jsonl(tmp_path / "rows.jsonl", TALKS))
    expected = list(once(rows, tokenizer)[0].examples)
    (folder,) = cache.iterdir()
    file = folder / name
    content = file.read_bytes()
    assert content
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if how == "cut" else bytes([content[0] ^ 1]) + content[1:])
    found, _, said = once(rows, tokenizer)
    assert "written to" in said
    assert list(found.examples) == expected
    assert "read from" in once(rows, tokenizer)[2]
    assert {each.name for each in folder.iterdir()} == {*token_cache._FILES, "facts.json"}


def test_two_processes_at_once_tokenize_once(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, runs = load_rows(jsonl(tmp_path / "rows.jsonl", PAIRS)), []
    entered, go_on = threading.Event(), threading.Event()

    def slow(*args: Any, **options: Any) -> Encoded:
        runs.append(1)
        entered.set()
        go_on.wait(60)
        return encode(*args, **options)

    monkeypatch.setattr(tokenized, "encode", slow)
    found: list[Any] = []
    first = threading.Thread(target=lambda: found.append(once(rows, tokenizer)))
    second = threading.Thread(target=lambda: found.append(once(rows, tokenizer)))
    first.start()
    assert entered.wait(60)
    second.start()
    second.join(0.3)  # it waits for the lock
    assert second.is_alive()
    go_on.set()
    first.join()
    second.join()
    assert len(runs) == 1
    assert list(found[0][0].examples) == list(found[1][0].examples)
    assert sum("tokenized by another process" in one[2] for one in found) == 1


def test_a_faulty_row_leaves_nothing_behind(tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    faulty = [*PAIRS, {"prompt": 3, "completion": "x"}]
    rows = load_rows(jsonl(tmp_path / "rows.jsonl", faulty))
    with pytest.raises(DataError, match=r"rows.jsonl: line 61: field 'prompt' is int, not text"):
        once(rows, tokenizer)
    (folder,) = cache.iterdir()
    assert list(folder.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_ADAPTERS_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"file/tokens/.*cannot be written .*MLX_ADAPTERS_CACHE"):
        once(load_rows(jsonl(tmp_path / "rows.jsonl", PAIRS)), tokenizer)


def run(loaded: model.LanguageModel, source: Any, output: Path, **options: Any) -> Trainer:
    settings = {
        "template": "plain",
        "steps": 6,
        "lr": 1e-2,
        "save_every": 2,
        "batch_size": 4,
        "max_length": 9,
    }
    return Trainer(loaded, source, "lora", output=output, **settings | options)


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_comes_out_the_same_and_goes_on_from_either(
    packing: bool, loaded: model.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether tokens lie on disk changes no loss, and a run begun one way is resumed the other way."""
    source = jsonl(tmp_path / "rows.jsonl", PAIRS)
    options: dict[str, Any] = {"validation": 7, "validate_every": 3, "packing": packing}
    on_disk = run(loaded, source, tmp_path / "disk", **options)
    assert not isinstance(on_disk.run.examples, list)
    expected = losses(on_disk)
    losses(run(loaded, source, tmp_path / "other", **options), stop=4)
    monkeypatch.setattr(large, "LARGE", 1 << 40)
    small = run(loaded, source, tmp_path / "memory", **options)
    assert isinstance(small.run.examples, list)
    assert small.meta.training == on_disk.meta.training
    assert small.meta.seen == on_disk.meta.seen
    assert losses(small) == expected
    resumed = run(loaded, source, tmp_path / "other", **options, resume=True)
    assert losses(resumed) == expected[4:]


def test_rows_are_left_out_and_limited_as_in_memory(
    loaded: model.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl(tmp_path / "rows.jsonl", PAIRS)
    test = jsonl(tmp_path / "test.jsonl", PAIRS[:2])
    monkeypatch.setattr(import_module("mlx_adapters.train.examples"), "_FEW", 0)
    for options in ({}, {"limit": 20}):
        found = run(loaded, source, tmp_path / "disk", exclude=[test], **options)
        found.detach()
        with monkeypatch.context() as patch:
            patch.setattr(large, "LARGE", 1 << 40)
            same = run(loaded, source, tmp_path / "memory", exclude=[test], **options)
            same.detach()
        assert list(found.run.examples) == list(same.run.examples)
        if not options:  # with a limit no row behind it is read
            assert found.excluded == same.excluded > 2


@pytest.mark.parametrize("pack", [None, 40])
def test_batches_are_those_of_lists(pack: int | None) -> None:
    """The order is that of the earlier releases, which sorted lists: old runs are resumed in it."""
    rng = np.random.default_rng(1)
    examples = [Example([1] * int(size), 1) for size in rng.integers(2, 40, 700)]
    found = groups(examples, batch_size=3, seed=5, epoch=2, pack=pack)
    rng = np.random.default_rng((5, 2))
    order = rng.permutation(len(examples)).tolist()
    rows = [[index] for index in order] if pack is None else _packed(examples, order, pack)
    made = []
    for first in range(0, len(rows), 96):
        chunk = sorted(rows[first : first + 96], key=lambda row: sum(len(examples[i].ids) for i in row))
        made += [chunk[i : i + 3] for i in range(0, len(chunk), 3)]
    assert list(found) == [made[i] for i in rng.permutation(len(made))]
    assert found[2:4] == [found[2], found[3]]
    assert pick(examples, np.array([4, 2])) == [examples[4], examples[2]]


def _packed(examples: list[Example], order: list[int], length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for index in order:
        size = len(examples[index].ids)
        near = range(max(0, len(rows) - 32), len(rows))
        place = next((row for row in near if room[row] >= size), None)
        if place is None:
            rows.append([index])
            room.append(length - size)
        else:
            rows[place].append(index)
            room[place] -= size
    return rows


def test_what_an_adapter_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many questions those with the smallest hashes are kept, whatever order they come in."""
    texts = [f"question {n}: " + " ".join(f"w{n}x{k}" for k in range(14)) for n in range(300)]
    whole = seen_hashes(texts)
    monkeypatch.setattr(overlap, "QUESTIONS", 50)
    monkeypatch.setattr(overlap, "KEPT", 40)
    monkeypatch.setattr(overlap, "COMMON", 10)
    known = seen_hashes(texts)
    items = [entry for entry in whole if not entry.startswith("g")]
    assert [entry for entry in known if not entry.startswith("g")] == items[:50]
    assert items[:50] == [entry for entry in seen_hashes(texts[::-1]) if not entry.startswith("g")]
    assert len(known) == 90
    found = overlap.overlap(known, texts)
    assert found.sampled
    assert len(found.seen) == 50
